"""Rule tables of the user's own: ``--parametrization custom --custom-parametrization module:function``."""

from __future__ import annotations

import importlib
from functools import cache

from megatron_mup.config import ConfigError
from megatron_mup.parametrization.schemes import Scheme


@cache
def custom_scheme(name: str) -> Scheme:
    """What the function ``module:function`` returns, called once without arguments.

    Raises:
        ConfigError: no such module or function, or it returns no `Scheme`.
    """
    flag = f"--custom-parametrization {name}"
    module_name, _, function = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            flag, f"can't import {module_name!r}: {error}", "put the folder of the module on PYTHONPATH"
        ) from error
    make = getattr(module, function, None)
    if not callable(make):
        raise ConfigError(flag, f"{module_name} has no function {function!r}", "write module:function")
    scheme = make()
    if not isinstance(scheme, Scheme):
        raise ConfigError(flag, f"it returned a {type(scheme).__name__}", "return a parametrization.schemes.Scheme")
    return scheme
