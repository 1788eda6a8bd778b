"""Names of the weight files of a result, as stock loaders and converters expect them."""

from planners.model.form import ModelForm


def weight_files(form: ModelForm) -> dict[str, str]:
    """Return part -> its file below the model's directory, as ``model-00002-of-00009.safetensors``.

    Parts are the units ``embedding``, ``layer-00000`` and so on and ``head``; ``norm``, the final
    norm, the head's shortcut and bias; ``positions``, the table of learned positions. A part that a
    model has not, such as a tied head or a norm that is folded away, has no file and no number.
    """
    parts = ["embedding", *(f"layer-{layer:05d}" for layer in range(len(form.layers)))]
    small = form.head_norm_weight or form.head_bias or form.head_shortcut
    parts += ["head"] * (not form.tied) + ["norm"] * small
    parts += ["positions"] * form.positions
    return {
        part: f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        for number, part in enumerate(parts, start=1)
    }
