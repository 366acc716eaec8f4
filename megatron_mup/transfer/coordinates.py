"""The coordinate check: how the size of activations and updates follows the size of the model.

Procedure of microsoft/mup (a few steps at a large learning rate on one batch) with the numbers of Tensor Programs V and
of the spectral condition (arXiv 2310.17813); `transfer.verdict` judges what is measured here.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from megatron_mup.config import Config
from megatron_mup.optim.blocks import block_shape, take_block
from megatron_mup.optim.main_params import MainParam
from megatron_mup.optim.optimizer import learning_rate_class
from megatron_mup.parallel.mesh import Mesh
from megatron_mup.parametrization.meta import Block
from megatron_mup.parametrization.schemes import Operations
from megatron_mup.parametrization.table import scaling, scheme_of
from megatron_mup.progress import track
from megatron_mup.training.observe import ATTENTION_LOGITS, class_of, numbers, watch, watch_attention
from megatron_mup.training.step import TrainStep
from megatron_mup.training.trainer import Trainer
from megatron_mup.transfer.sizes import Growth, Size, resize

ACTIVATION = "activation"
CHANGE = "activation change"
UPDATE = "update x input"
WEIGHT = "spectral norm"
WEIGHT_CHANGE = "spectral norm of change"
VECTOR_CHANGE = "vector change"
EPSILON = "epsilon / gradient"

FINAL_RESIDUAL = "final residual"


class Value(NamedTuple):
    """One measured number of one model.

    Attributes:
        quantity: ``activation`` and ``activation change`` since step 0: root mean square (RMS) of what a class of
            modules puts out; ``update x input``: RMS of what the weights' change since step 0 puts out for the present
            input; ``spectral norm`` (of the ``change`` since step 0): mean over a class's logical matrices of
            ``sqrt(in/out) ||W||_2``; ``vector change``: RMS of the change of gains or biases; ``epsilon / gradient``:
            AdamW's epsilon over the root of the mean second moment, mean over a class.
        name: class of modules or of parameters.
        step: optimizer steps taken.
    """

    quantity: str
    name: str
    step: int
    value: float


@dataclass(frozen=True)
class Row:
    """A :class:`Value` and the model that it is from."""

    hidden_size: int
    num_layers: int
    num_experts: int
    seed: int
    quantity: str
    name: str
    step: int
    value: float


def measure(config: Config, vocab_size: int, mesh: Mesh, steps: int) -> list[Value]:
    """Trains a model for a few steps on one batch and measures before and after; the same on every rank.

    The model is the run's own, and so is everything that trains it; learning rates are at their peak from the first
    step.

    Args:
        config: validated configuration.
        vocab_size: number of token ids.
        mesh: the run's mesh.
        steps: optimizer steps; measured after 0, 1, 2, 4, 8 … of them and after the last.
    """
    training = replace(config.training, train_iters=max(steps, 1), train_samples=None)
    # Whole matrices are looked at, which DeepSpeed keeps in runs of elements; the engines train the same function.
    config = replace(config, training=training, parallel=replace(config.parallel, distributed_engine="native"))
    with Trainer(config, vocab_size, mesh) as trainer:
        step, batch = trainer.step, trainer.batch(0, trainer.ramp.full)
        modules, weights = _Modules(step), _Weights(step)
        found = modules.measure(batch, 0) + weights.measure(0)
        for number in range(1, steps + 1):
            step(batch, 1.0)
            last = number == steps
            if last or number & (number - 1) == 0:
                found += modules.measure(batch, number)
            if last:
                found += weights.measure(number)
    return found


def measure_sizes(
    config: Config,
    vocab_size: int,
    mesh: Mesh,
    sizes: list[Size],
    steps: int,
    seeds: list[int],
    grow: Growth = "heads",
) -> Iterator[Row]:
    """:func:`measure` for every size and every seed; model by model.

    Args:
        config: recipe, base sizes written out (`sizes.pin_base`).
        vocab_size, mesh, steps: as in :func:`measure`.
        sizes: of each model.
        seeds: of initial values and data.
        grow: what grows with the hidden size.
    """
    for size, seed in track(list(itertools.product(sizes, seeds)), "coordinate check"):
        sized = resize(config, size.hidden_size, size.num_layers, grow, size.num_experts)
        seeded = replace(sized, training=replace(sized.training, seed=seed))
        for value in measure(seeded, vocab_size, mesh, steps):
            yield Row(size.hidden_size, size.num_layers, sized.moe.num_experts or 0, seed, *value)


class _Modules:
    """Root mean squares of what modules put out, by class, now and against the first time."""

    def __init__(self, step: TrainStep) -> None:
        self.step, self.config = step, step.config
        self._first_outputs: dict[tuple[str, int], torch.Tensor] = {}
        self._first_weights: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def measure(self, batch: dict[str, torch.Tensor], number: int) -> list[Value]:
        """Runs the model forward over a batch."""
        sums: dict[tuple[str, str], torch.Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
        calls: dict[str, int] = defaultdict(int)
        last_layer = f"decoder.layers.{self.config.model.num_layers - 1}"

        def add(quantity: str, name: str, values: torch.Tensor) -> None:
            square = torch.linalg.vector_norm(values.double()).square()
            sums[quantity, name] += torch.tensor([square.item(), values.numel()], dtype=torch.float64)

        def seen(name: str, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            key = (name, calls[name])
            calls[name] += 1
            for label in [class_of(name)] + ([FINAL_RESIDUAL] if name == last_layer else []):
                add(ACTIVATION, label, output)
                if number == 0:
                    self._first_outputs[key] = output.clone()
                elif ".experts" not in name:  # Whose rows are other tokens when routing changes.
                    add(CHANGE, label, output - self._first_outputs[key])
            weight = _weight(module, inputs)
            if weight is None:
                return
            if number == 0:
                self._first_weights.setdefault(name, weight.detach().clone())
            else:
                change = weight.detach() - self._first_weights[name]
                moved = _forward_with(module, change, inputs)
                scale = self.step.model.logits_multiplier if module is self.step.model.output_layer else 1.0
                add(UPDATE, class_of(name), moved * scale)

        def attention(name: str, logits: torch.Tensor) -> None:
            key = (name + ".logits", calls[name + ".logits"])
            calls[key[0]] += 1
            visible = logits[torch.isfinite(logits)]
            add(ACTIVATION, ATTENTION_LOGITS, visible)
            if number == 0:
                self._first_outputs[key] = visible
            else:
                add(CHANGE, ATTENTION_LOGITS, visible - self._first_outputs[key])

        with watch(self.step.model, seen), watch_attention(self.step.model, attention):
            self.step.evaluate(batch)
        return [
            Value(quantity, name, number, math.sqrt(square / count)) for (quantity, name), (square, count) in _sum(sums)
        ]


def _weight(module: nn.Module, inputs: tuple[Any, ...]) -> torch.Tensor | None:
    """The matrix of a linear module or embedding; a tied output layer gets it as its second input."""
    weight = inputs[1] if _shares(inputs) else getattr(module, "weight", None)
    return weight if isinstance(weight, torch.Tensor) and weight.dim() == 2 else None


def _shares(inputs: tuple[Any, ...]) -> bool:
    """Whether a module is handed its matrix; experts' second input are numbers of rows."""
    return len(inputs) > 1 and isinstance(inputs[1], torch.Tensor) and inputs[1].dim() == 2


def _forward_with(module: nn.Module, weight: torch.Tensor, inputs: tuple[Any, ...]) -> torch.Tensor:
    """What a linear module or embedding would put out with another weight and no bias."""
    twin = copy.copy(module)
    twin._parameters = dict.fromkeys(module._parameters)
    twin._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
    if _shares(inputs):
        inputs = (inputs[0], weight, *inputs[2:])
    moved = numbers(type(module).forward(twin, *inputs))
    assert isinstance(moved, torch.Tensor)
    return moved


class _Weights:
    """Norms of the weights and of their change, and AdamW's epsilon beside its second moments."""

    def __init__(self, step: TrainStep) -> None:
        self.step = step
        self._first: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def measure(self, number: int) -> list[Value]:
        """Looks at every parameter of this rank's stage; the stages tell each other."""
        means: dict[tuple[str, str], torch.Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))

        def add(quantity: str, name: str, value: float) -> None:
            means[quantity, name] += torch.tensor([value, 1.0], dtype=torch.float64)

        for main in self.step.main.params:
            if main.meta.tied_to is not None:
                continue
            name, whole = learning_rate_class(main.meta), main.layout.gather(main.value)
            if number == 0:
                self._first[main.meta.name] = whole.clone()
            elif len(main.meta.shape) == 1:
                add(VECTOR_CHANGE, name, (whole - self._first[main.meta.name]).square().mean().sqrt().item())
            if main.meta.role.is_orthonormalized:
                for block_name, norm in self._norms(main, whole):
                    add(WEIGHT, block_name, norm)
                if number:
                    for block_name, norm in self._norms(main, whole - self._first[main.meta.name]):
                        add(WEIGHT_CHANGE, block_name, norm)
        if number:
            for name, ratio in self._epsilons():
                add(EPSILON, name, ratio)
        return [Value(quantity, name, number, float(total / count)) for (quantity, name), (total, count) in _sum(means)]

    def _norms(self, main: MainParam, whole: torch.Tensor) -> Iterator[tuple[str, float]]:
        """Class and ``sqrt(in/out) ||W||_2`` of each logical matrix."""
        meta = main.meta
        # Unit-scaled matrices divide by sqrt(fan-in) as they act.
        unit = 1.0 if scheme_of(self.step.config).operations is Operations.PLAIN else meta.fan_in**-0.5
        for block in meta.blocks or (Block(meta.role.value, 0, meta.shape[0], meta.shape[0]),):
            rows, columns = block_shape(meta, block)
            for matrix in take_block(whole, block).reshape(-1, rows, columns):
                yield block.name, unit * math.sqrt(columns / rows) * spectral_norm(matrix)

    def _epsilons(self) -> Iterator[tuple[str, float]]:
        """Class and epsilon over the root mean second moment of each parameter that AdamW trains."""
        config, states = self.step.config, self.step.optimizer.state_tensors()
        unbias = 1 - config.optimizer.adam_beta2 ** self.step.optimizer.state_scalars()["step"]
        for main in self.step.main.params:
            state, numbers = states.get(f"exp_avg_sq/{main.meta.name}"), scaling(main.meta, config)
            if state is None or not numbers.eps or main.meta.tied_to is not None:
                continue
            moment = main.layout.gather(state[1]).double().mean() / unbias
            yield learning_rate_class(main.meta), numbers.eps / max(math.sqrt(moment), 1e-300)


def spectral_norm(matrix: torch.Tensor) -> float:
    """Largest singular value; from 512 rows and columns on to about a percent, by randomised iteration.

    On the CPU: a GPU would be busy with launches, for matrices as small as these.
    """
    matrix = matrix.cpu()
    if min(matrix.shape) < 512:
        return float(torch.linalg.matrix_norm(matrix, ord=2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return float(torch.svd_lowrank(matrix, q=8, niter=8)[1][0])


def _sum(mine: Mapping[tuple[str, str], torch.Tensor]) -> list[tuple[tuple[str, str], list[float]]]:
    """Pairs of numbers summed over all ranks, which need not have the same keys.

    A rank counts what it sees: copies over tensor ranks or replicas weigh in numerator and denominator alike.
    """
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, {key: pair.tolist() for key, pair in mine.items()})
    total: dict[tuple[str, str], list[float]] = {}
    for part in parts:
        for key, (top, bottom) in part.items():
            before = total.get(key, [0.0, 0.0])
            total[key] = [before[0] + top, before[1] + bottom]
    return list(total.items())
