"""Convert a quantised result for llama.cpp, every integer as it is.

llama.cpp's own converter reads few of these matrices, and those as floats, which its quantiser then
rounds anew. This runs that converter, which knows the tokenizer, the names and the order of rows,
and gives it each matrix in a type that holds the integers; docs/serving.md has the settings that
have one. What was written is decoded and compared, bit for bit.

    python examples/quantised_to_gguf.py LLAMA_CPP RUN/model --outfile model.gguf

LLAMA_CPP is a checkout of llama.cpp; the rest goes to its ``convert_hf_to_gguf.py``, whose
``--outtype`` is for the tensors that are not quantised.
"""

import sys
from dataclasses import replace
from typing import Any

import torch
from narrow_heads_to_gguf import converter

from actors.numerics.blocks import blocks_of
from actors.numerics.packing import integers_of
from actors.numerics.rounding import Scales
from actors.storage.quantised import part_names, schemes_in
from planners.model.blocks import BlockType, block_type
from planners.model.scheme import WHOLE_ROW, Scheme

OTHERWISE = "give llama.cpp's own quantiser the model as it was before it was quantised"


def keep_integers(model: Any) -> None:
    """Hand every quantised matrix of a checkpoint to the writer, in place of what decodes it.

    Args:
        model: llama.cpp's converter of the checkpoint, a ``ModelBase``.
    """
    schemes = schemes_in(model.hparams)
    if not schemes:
        sys.exit(f"{model.dir_model}: is no quantised result of compress-cluster")
    for module, scheme in schemes.items():
        _keep(model, module, scheme)


def _keep(model: Any, module: str, scheme: Scheme) -> None:
    import gguf
    from conversion.base import LazyTorchTensor

    parts = {
        name.removeprefix(f"{module}."): LazyTorchTensor.to_eager(model.model_tensors.pop(name)())
        for name in part_names(module, scheme)
    }
    kind = _kind(module, scheme, parts)
    rounded = integers_of(parts, scheme)
    (layer,) = [int(word) for word in module.split(".") if word.isdecimal()] or [None]

    def ordered(matrix: torch.Tensor) -> tuple[str, torch.Tensor]:
        """Return the name of a matrix in a GGUF file, and its rows in the order there."""
        ((name, found),) = model.modify_tensors(matrix, f"{module}.weight", layer)
        return name, found

    scales = Scales(scale=ordered(rounded.scales.scale)[1], zero=ordered(rounded.scales.zero)[1])
    name, codes = ordered(rounded.codes)
    blocks = blocks_of(replace(rounded, codes=codes, scales=scales), kind).numpy()
    as_type = gguf.GGMLQuantizationType[kind.name]
    decoded = torch.from_numpy(gguf.quants.dequantize(blocks, as_type))
    if not torch.equal(decoded, ordered(rounded.values())[1]):
        sys.exit(f"{module}: has a scale that no float16 equals, as {kind.name} needs; {OTHERWISE}")
    model.gguf_writer.add_tensor(name, blocks, raw_dtype=as_type)


def _kind(module: str, scheme: Scheme, parts: dict[str, torch.Tensor]) -> BlockType:
    width = int(parts["weight_shape"][1]) if "weight_shape" in parts else 0
    kind = block_type(scheme, width)
    if kind is None:
        row = f" in rows of {width}" if scheme.group == WHOLE_ROW else ""
        sys.exit(f"{module}: no type of llama.cpp holds {scheme}{row} exactly; {OTHERWISE}")
    return kind


def main() -> None:
    """Convert as the arguments say."""
    convert = converter()
    convert.ModelBase.dequant_model = keep_integers
    convert.main()


if __name__ == "__main__":
    main()
