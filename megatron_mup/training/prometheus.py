"""The latest metrics at ``http://HOST:PORT/metrics``, for a Prometheus server to fetch."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from megatron_mup.config import ConfigError

PREFIX = "megatron_mup"
LEFT_OUT = "train/left out"
"""Said of single steps, so it is counted here."""

_LABELLED = (
    (re.compile(r"lr/(?P<class>.+)"), "lr"),
    (re.compile(r"moe/layer (?P<layer>\d+)/tokens of expert (?P<expert>\d+)"), "moe layer tokens of expert"),
    (re.compile(r"moe/layer (?P<layer>\d+)/(?P<rest>.+)"), "moe layer"),
    (re.compile(r"diagnostics/(?P<rest>[^/]+)/(?P<class>.+)"), "diagnostics"),
)
"""Names of which a part becomes a label; ``rest`` stays in the name."""


def metric_of(name: str) -> tuple[str, dict[str, str]]:
    """Name and labels in Prometheus' alphabet: ``lr/qkv`` is ``megatron_mup_lr{class="qkv"}``."""
    labels: dict[str, str] = {}
    for pattern, family in _LABELLED:
        if found := pattern.fullmatch(name):
            labels = found.groupdict()
            name = f"{family} {labels.pop('rest', '')}"
            break
    return re.sub(r"[^A-Za-z0-9]+", "_", f"{PREFIX} {name}").strip("_"), labels


class Prometheus:
    """A server thread on all of the host's interfaces. Gauges hold the last value of each scalar.

    Beside them: ``megatron_mup_iteration``, ``megatron_mup_last_update_seconds`` (Unix time, to alert on a run that
    stands still), ``megatron_mup_train_left_out_total`` and ``megatron_mup_run_info``.

    Args:
        port: TCP port; 0 takes a free one.
        about: of `about_run`.

    Attributes:
        port: where it listens.

    Raises:
        ConfigError: the port is taken or not allowed.
    """

    def __init__(self, port: int, about: Mapping[str, Any]) -> None:
        """Starts to serve."""
        from prometheus_client import CollectorRegistry, Counter, Gauge, Info, start_http_server

        self._registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._iteration = Gauge(f"{PREFIX}_iteration", "steps done", registry=self._registry)
        self._updated = Gauge(f"{PREFIX}_last_update_seconds", "Unix time of the last record", registry=self._registry)
        self._left_out = Counter(f"{PREFIX}_train_left_out", "steps left out since the start", registry=self._registry)
        facts = {"started": about["started"], "device": about["device"], **about["versions"]}
        Info(f"{PREFIX}_run", "of the run", registry=self._registry).info({k: str(v) for k, v in facts.items()})
        try:
            self._server, self._thread = start_http_server(port, registry=self._registry)
        except OSError as error:
            raise ConfigError(
                f"--prometheus-port {port}",
                f"can't be listened on: {error.strerror}",
                "give another port, one for each run on this host",
            ) from None
        self.port: int = self._server.server_port

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """Replaces the values of the scalars."""
        from prometheus_client import Gauge

        self._iteration.set(iteration)
        self._updated.set(time.time())
        for name, value in scalars.items():
            if name == LEFT_OUT:
                self._left_out.inc(value)
                continue
            metric, labels = metric_of(name)
            if metric not in self._gauges:
                self._gauges[metric] = Gauge(metric, name, labels.keys(), registry=self._registry)
            gauge = self._gauges[metric]
            (gauge.labels(**labels) if labels else gauge).set(value)

    def flush(self) -> None:
        """Nothing to do: a request sees the last values."""

    def close(self) -> None:
        """Stops the server and frees the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
