"""Convert a result with narrower heads for llama.cpp, whose own converter drops its rope factors.

Such a result is a stock Llama or Mistral with ``head_dim`` below the original's, and a ``longrope``
whose factors give each pair of channels its frequency. llama.cpp has a table for such factors,
``rope_freqs``, which its converter writes for Llama 3 alone. This runs that converter and adds it.

    python examples/narrow_heads_to_gguf.py LLAMA_CPP RUN/model --outfile model.gguf

LLAMA_CPP is a checkout of llama.cpp; the rest goes to its ``convert_hf_to_gguf.py``.
"""

import sys
from collections.abc import Iterator
from typing import Any


def with_factors(base: Any, gguf: Any, torch: Any) -> Any:
    """Return llama.cpp's converter of Llamas and Mistrals, with one more table."""

    class WithFactors(base):  # type: ignore[misc]
        model_arch = base.model_arch

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.factors: list[float] = []
            rope = self.rope_parameters
            if rope.get("rope_type") == "longrope":
                if rope["short_factor"] != rope["long_factor"]:
                    sys.exit("the factors depend on the length of a text: no narrow_heads result")
                self.factors = rope["short_factor"]
                rope["rope_type"] = "default"  # the table says all that longrope did

        def set_gguf_parameters(self) -> None:
            super().set_gguf_parameters()
            if self.factors:
                factor = self.rope_parameters.get("attention_factor") or 1.0
                self.gguf_writer.add_rope_scaling_attn_factors(factor)

        def generate_extra_tensors(self) -> Iterator[tuple[str, Any]]:
            yield from super().generate_extra_tensors()
            if self.factors:
                name = self.format_tensor_name(gguf.MODEL_TENSOR.ROPE_FREQS)
                yield name, torch.tensor(self.factors, dtype=torch.float32)

    return WithFactors


def converter() -> Any:
    """Return the module of llama.cpp's converter, taught; its checkout is the first argument."""
    root = sys.argv.pop(1)
    sys.path[:0] = [root, f"{root}/gguf-py"]

    import convert_hf_to_gguf
    import gguf
    import torch
    from conversion.llama import LlamaModel

    found = with_factors(LlamaModel, gguf, torch)
    convert_hf_to_gguf.ModelBase.register("LlamaForCausalLM", "MistralForCausalLM")(found)
    return convert_hf_to_gguf


if __name__ == "__main__":
    converter().main()
