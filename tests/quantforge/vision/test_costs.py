from torch import nn

from quantforge.vision.building import build
from quantforge.vision.costs import multiplications
from quantforge.vision.network import Preprocessing


def test_multiplications_of_every_kind_of_layer() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8),
        nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 10),
    )  # fmt: skip
    preprocessing = Preprocessing(size=(16, 16), mean=(0.0,), deviation=(1.0,))
    network = build(module, preprocessing, name="test", fingerprint="0")
    # 8 × 8 places; 6 × 6; every one of 6 × 6 inputs meets 2 × 2 weights of 2 outputs, 8 channels.
    assert multiplications(network) == {
        "0": 64 * 8 * 27, "2": 36 * 8 * 9, "3": 36 * 8 * 2 * 4, "6": 40,
    }  # fmt: skip
