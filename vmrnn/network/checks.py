"""What sizes a network can have, and what frames it can take."""

from vmrnn.errors import UserError, range_complaint


def check_network(img_size, patch_size, in_chans, embed_dim, stride):
    """Raises UserError, with the reason, for a network that cannot be built.

    img_size  int, (H, W), or None where the size is not known yet
    stride    pixels of a frame per position of the coarsest map
    The other parameters are those of VMRNN_B.
    """
    if patch_size < 2 or patch_size & (patch_size - 1):
        raise UserError(f"patch_size {patch_size}: the head doubles the map, so it must be 2, 4, 8, ...")
    if min(in_chans, embed_dim) < 1:
        raise UserError(f"in_chans {in_chans}, embed_dim {embed_dim}: both must be at least 1")
    if patch_size > 2 and embed_dim % 16:
        raise UserError(
            f"embed_dim {embed_dim}: with patch_size {patch_size} the head's GroupNorm needs a multiple of 16"
        )
    if img_size is not None:
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if len(size) != 2 or min(size) < 1:
            raise UserError(f"img_size {img_size}: give an int or (height, width), at least 1")
        check_frame_size(*size, stride)


def check_frame(shape, in_chans, stride):
    """Raises UserError unless frames of `shape` (B, C, H, W) fit a network of in_chans channels and that stride."""
    if shape[1] != in_chans:
        raise UserError(f"frames of {shape[1]} channels, but the network takes {in_chans}; set --input_channels")
    check_frame_size(*shape[2:], stride)


def check_frame_size(H, W, stride):
    """Raises UserError unless both sides are multiples of the stride."""
    if H % stride or W % stride:
        raise UserError(
            f"frames of {H}x{W}: height and width must be multiples of {stride}, "
            "patch_size doubled by each merging level"
        )


def check_depths(**depths):
    """Raises UserError unless every value is a list of numbers of blocks."""
    for name, blocks in depths.items():
        if not isinstance(blocks, list | tuple) or not blocks or any(not isinstance(d, int) or d < 1 for d in blocks):
            raise UserError(f"{name} {blocks}: give a list of whole numbers, at least 1, one for each cell")


def check_options(d_state, **rates):
    """Raises UserError unless d_state is at least 1 and every rate in [0, 1)."""
    if complaint := range_complaint(d_state, at_least=1):
        raise UserError(f"d_state {d_state}: {complaint}")
    for name, rate in rates.items():
        if complaint := range_complaint(rate, at_least=0, below=1):
            raise UserError(f"{name} {rate}: {complaint}")
