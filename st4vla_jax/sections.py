"""Config sections: plain dicts to frozen dataclasses, every problem by its key."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from st4vla_jax.data.robot_spec import nearest


def checked_section(
    cls: type, tree: Mapping[str, Any], key: str, problems: list[str]
) -> Any | None:
    """An instance of a dataclass from a dict, lists as tuples.

    Args:
      cls: a dataclass; it may raise ValueError.
      tree: its fields by name.
      key: name of the section in the config, for messages.
      problems: appended to, in place of raising.

    Returns:
      The instance, or None if the keys do not fit.
    """
    known = {field.name: field for field in dataclasses.fields(cls)}
    prefix = f"{key}." if key else ""
    found = [f"{prefix}{k}: unknown key{nearest(k, known)}" for k in tree if k not in known]
    found += [
        f"{prefix}{name}: missing"
        for name, field in known.items()
        if name not in tree
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if found:
        problems += found
        return None
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in tree.items()}
    try:
        return cls(**values)
    except ValueError as error:
        problems.append(f"{key}: {error}")
        return None
