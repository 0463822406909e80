"""transformers' chunked gated delta rule in PyTorch, which its models run without a GPU kernel."""

import os

import torch
import transformers
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

VERSIONS = {"transformers": transformers.__version__, "torch": torch.__version__}
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
_inputs: dict[str, torch.Tensor] = {}


def load(arrays):
    _inputs.clear()
    _inputs.update({name: torch.from_numpy(x) for name, x in arrays.items()})


def run(work):
    if work == "forward":
        with torch.no_grad():
            out, state = _rule(**_inputs)
        return lambda: {"out": out.numpy(), "state": state.numpy()}
    leaves = {name: x.detach().requires_grad_() for name, x in _inputs.items()}
    out, state = _rule(**leaves)
    ((out**2).sum() + (state**2).sum()).backward()
    return lambda: {f"d{name}": leaf.grad.numpy() for name, leaf in leaves.items()}


def _rule(q, k, v, g, beta):
    return torch_chunk_gated_delta_rule(q, k, v, g=g, beta=beta, output_final_state=True)
