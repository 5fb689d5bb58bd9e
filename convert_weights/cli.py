"""What the command lines share: expected errors, an orderly end on signals, kinds of options."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable

from convert_weights.rules import ConversionError
from st4vla_jax.checkpoint import CheckpointError
from st4vla_jax.config import ConfigError
from st4vla_jax.data.image import ImageError
from st4vla_jax.data.normalize import StatisticsError
from st4vla_jax.data.prompts import PromptError
from st4vla_jax.data.tokenizer import TokenizerError
from st4vla_jax.signals import orderly_end

# Errors whose message says what to do; all others are our mistakes and show their traceback.
ERRORS = (
    CheckpointError, ConfigError, ConversionError, ImageError, OSError, PromptError,
    StatisticsError, TokenizerError,
)  # fmt: skip

Main = Callable[[list[str] | None], int]


def command(main: Main) -> Main:
    """Decorates a main: an expected error becomes one message and exit status 1."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        with orderly_end():
            try:
                return main(argv)
            except ERRORS as error:
                print(f"error: {error}", file=sys.stderr)
                return 1

    return run


def positive(text: str) -> int:
    """An option's value that must be an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value
