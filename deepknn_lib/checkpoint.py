"""The state of a training after an epoch, in one file."""

import json
from pathlib import Path

import torch

from deepknn_lib.models import Network
from deepknn_lib.storage import whole_file


def save(path: Path, network: Network, optimizer: torch.optim.Optimizer, history: list[dict]) -> None:
    """Network, momentum and history in one file that appears whole."""
    from safetensors.torch import save_file

    tensors = {f"network.{name}": value.contiguous() for name, value in network.state_dict().items()}
    for number, parameter in enumerate(network.parameters()):
        buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if buffer is not None:
            tensors[f"momentum.{number}"] = buffer.contiguous()
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata={"history": json.dumps(history)})


def restore(path: Path, network: Network, optimizer: torch.optim.Optimizer) -> list[dict]:
    """The history up to the last checkpoint, its state put back; empty when there is none."""
    from safetensors import safe_open

    if not path.is_file():
        return []
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        history = json.loads(file.metadata()["history"])
    prefix = "network."
    network.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    for number, parameter in enumerate(network.parameters()):
        if f"momentum.{number}" in tensors:
            momentum = torch.empty_like(parameter)  # in the parameter's memory layout, as it was before
            optimizer.state[parameter]["momentum_buffer"] = momentum.copy_(tensors[f"momentum.{number}"])
    return history
