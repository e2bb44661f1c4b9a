"""Leaving secrets out of what is written down of a command."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

HIDDEN = "[hidden]"
_NAMES = r"(?:token|secret|password|passwd|credentials?|[._-]key|apikey)"
"""How the names of secrets end."""
_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_IN_FLAG = re.compile(rf"((?:^--?|[?&])[\w.-]*{_NAMES}=)[^&]+", re.IGNORECASE | re.DOTALL)
_OF_A_SERVICE = re.compile(r"\b(?:hf_|ghp_|github_pat_|glpat-|sk-|AKIA|ya29\.)[\w-]{12,}")


def redacted(arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> list[str]:
    """The arguments of a command without secrets.

    Hidden are the values of variables of the environment whose names say that they are secret,
    of flags and URL parameters with such names, the user part of URLs, and what begins as the
    tokens of well-known services do.
    """
    environment = os.environ if environment is None else environment
    secrets = sorted(
        (
            value
            for name, value in environment.items()
            if len(value) >= 8 and re.search(f"{_NAMES}$", name, re.IGNORECASE)
        ),
        key=len,
        reverse=True,
    )
    hidden = []
    for argument in arguments:
        for secret in secrets:
            argument = argument.replace(secret, HIDDEN)
        argument = _IN_URL.sub(HIDDEN, argument)
        argument = _IN_FLAG.sub(rf"\1{HIDDEN}", argument)
        hidden.append(_OF_A_SERVICE.sub(HIDDEN, argument))
    return hidden
