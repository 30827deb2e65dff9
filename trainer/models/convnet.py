"""A plain convolutional net whose depth, kernel sizes and widths are settings.

This is what hyper-parameter sweeps search: every combination that they are likely to draw is a
working net, and the others are refused with a reason.
"""

from collections.abc import Sequence

from torch import Tensor, nn


def per_layer(key: str, value: int | Sequence[int], depth: int) -> tuple[int, ...]:
    """One positive int per layer, from one int for all layers or a list. Raises ValueError."""
    values = (value,) * depth if isinstance(value, int) else tuple(value)
    if len(values) != depth:
        raise ValueError(f"{key}={list(values)}: give one value, or one per layer (depth={depth})")
    if any(not isinstance(v, int) or v < 1 for v in values):
        raise ValueError(f"{key}={list(values)}: every value must be a whole number of at least 1")
    return values


def pooled_layers(depth: int, image_size: int) -> tuple[bool, ...]:
    """For each layer, whether it ends in a 2x2 max-pool.

    There are as many pools as leave a map of at least 3x3 at the end, but at most one per layer.
    They are evenly spaced, the last one after the last layer. 28x28: depth 1 to 3 pool after every
    layer, depth 4 after layers 2, 3, 4, depth 6 after 2, 4, 6.
    """
    halvings, size = 0, image_size
    while size // 2 >= 3 and halvings < depth:
        halvings, size = halvings + 1, size // 2
    return tuple((i + 1) * halvings // depth > i * halvings // depth for i in range(depth))


class ConvNet(nn.Module):
    """`depth` convolutions (same padding, ReLU, some with a 2x2 max-pool), then two Linears.

    Images [N, in_channels, image_size, image_size] -> logits [N, classes]. `kernel_size` (odd
    pixels) and `width` (filters) are one number or one per layer; `hidden` is the number of units
    between the convolutions and the output. Raises ValueError for lists of the wrong length, even
    kernels, and kernels so large that their outermost weights never see the image.
    """

    def __init__(
        self,
        depth: int = 2,
        kernel_size: int | Sequence[int] = 5,
        width: int | Sequence[int] = 32,
        hidden: int = 128,
        in_channels: int = 1,
        image_size: int = 28,
        classes: int = 10,
    ) -> None:
        super().__init__()
        sizes = {"depth": depth, "hidden": hidden, "in_channels": in_channels}
        for key, value in {**sizes, "image_size": image_size, "classes": classes}.items():
            if value < 1:
                raise ValueError(f"{key}={value}: it must be at least 1")
        kernels = per_layer("kernel_size", kernel_size, depth)
        widths = per_layer("width", width, depth)

        layers: list[nn.Module] = []
        channels, size = in_channels, image_size
        pooled = pooled_layers(depth, image_size)
        for i, (kernel, filters, pool) in enumerate(zip(kernels, widths, pooled, strict=True)):
            if kernel % 2 == 0:
                raise ValueError(
                    f"kernel_size={kernel} in layer {i + 1}: it must be odd, so that equal padding "
                    "on both sides keeps the size of the image"
                )
            if kernel > 2 * size - 1:
                raise ValueError(
                    f"kernel_size={kernel} in layer {i + 1}: its input is only {size}x{size} "
                    f"pixels; use at most {2 * size - 1}, fewer layers or a larger image_size"
                )
            layers += [nn.Conv2d(channels, filters, kernel, padding=kernel // 2), nn.ReLU()]
            channels = filters
            if pool:
                layers.append(nn.MaxPool2d(2))
                size //= 2
        self.features = nn.Sequential(*layers)
        self.fc1 = nn.Linear(channels * size * size, hidden)
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.fc1(self.features(images).flatten(1)).relu()
        logits: Tensor = self.fc2(x)
        return logits
