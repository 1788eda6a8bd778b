"""What serves a result: facts of engines that decide which widths are of use."""

# Head widths for which vLLM's attention backends have kernels.
VLLM_HEAD_DIMS: tuple[int, ...] = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
