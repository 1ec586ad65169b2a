"""The survey's methods as policies: one file per class of its taxonomy, one function per method."""

from __future__ import annotations

from typing import Any

from dcc import arguments
from dcc.errors import PolicyError
from dcc.policies import hybrid, hybrid_blocks, layer_adaptive, predictive, static, timestep_adaptive
from dcc.policies.base import DEFAULT_SITE, REQUIRED, Cached, Method, Policy, Setting

__all__ = ["DEFAULT_SITE", "POLICIES", "Cached", "Method", "Policy", "Setting", "make_policy", "names"]

DEFAULT_POLICY = "taylorseer"
POLICIES: dict[str, Method] = {
    value.name: value
    for module in (static, timestep_adaptive, layer_adaptive, predictive, hybrid, hybrid_blocks)
    for value in vars(module).values()
    if isinstance(value, Method)
}


def names() -> list[str]:
    """The names that `policy=` takes, by class of the survey."""
    return list(POLICIES)


def make_policy(name: str, setting: Setting, parameters: dict[str, Any]) -> Policy:
    """The named policy for a setting. Raises PolicyError for an unknown name, parameter or value, or a missing one."""
    known = parameter_names(name)
    unknown = [key for key in parameters if key not in known]
    if unknown:
        raise PolicyError(
            f"policy {name!r} takes no parameter {arguments.listed(unknown, known)}; it takes: {', '.join(known)}"
        )
    missing = [key for key, value in POLICIES[name].defaults.items() if value == REQUIRED and key not in parameters]
    if missing:
        raise PolicyError(f"policy {name!r} needs {', '.join(missing)}=: see `dcc policies {name}`")
    return POLICIES[name](setting, **parameters)


def parameter_names(name: str) -> list[str]:
    """The keyword parameters of a policy. Raises PolicyError for an unknown name."""
    return POLICIES[arguments.chosen("policy", name, POLICIES, PolicyError)].parameters
