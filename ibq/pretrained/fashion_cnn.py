"""fashion-cnn: a small classifier of Fashion-MNIST, whose features measure distances between sets of such images.

Inception-v3 has seen photographs of 299 x 299 pixels; what it makes of 28 x 28 pictures of clothes is neither
meaningful nor cheap, and its weights are a download. This network stands in for it. Its numbers are labelled
`[fashion-cnn]` everywhere, and compare with nothing but other numbers of the same weights. As with Inception, the
features are the spatial mean of the last convolution (here 64 numbers, so that the covariance of 2,000 images has full
rank many times over) and the logits serve the inception score.

`python -m ibq.pretrained.fashion_cnn FOLDER` trains it anew, on exactly what a tokenizer sees: 28 x 28 pixels in a
black frame of 32 x 32.

Suffixes: B images, C channels, H W pixels, F features, L classes.
"""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from ibq.data.fashion_mnist import FASHION_MNIST_RESOLUTION, load_fashion_mnist
from ibq.data.images import Images
from ibq.errors import DataError

FEATURES, CLASSES = 64, 10
WEIGHTS_SHA256 = "2500cff1c0a82f04c98a46c07000c88f1f30a9c51b3b879d4899e41d0be9371b"
EPOCHS, BATCH_SIZE, PEAK_LR, SHIFT = 12, 256, 0.01, 2


class FashionCNN(nn.Module):
    """Six convolutions with batch norm, spatial mean, one linear layer: 215,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for c_in, c_out, kernel, stride in (
            (1, 32, 5, 2),
            (32, 32, 3, 1),
            (32, 64, 3, 2),
            (64, 64, 3, 1),
            (64, 128, 3, 2),
            (128, FEATURES, 3, 1),
        ):
            layers += [
                nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False),
                nn.BatchNorm2d(c_out),
                nn.ReLU(inplace=True),
            ]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(FEATURES, CLASSES)

    def forward(self, images_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features and logits.

        Args:
            images_BCHW: uint8, 32 x 32, of any number of channels; their mean is seen, so that a grey picture gives the
                same with one channel and with three.

        Returns:
            features_BF and logits_BL.

        Raises:
            ValueError: another size or type.
        """
        resolution = FASHION_MNIST_RESOLUTION
        if images_BCHW.dtype != torch.uint8 or images_BCHW.shape[2:] != (resolution, resolution):
            given = f"{images_BCHW.dtype} {tuple(images_BCHW.shape)}"
            raise ValueError(
                f"fashion-cnn reads uint8 images (B, C, {resolution}, {resolution}), not {given}; resize them to it"
            )
        grey_B1HW = images_BCHW.float().sum(1, keepdim=True) / images_BCHW.shape[1]  # exact for equal channels
        features_BF = self.body(grey_B1HW / 127.5 - 1).mean((2, 3))
        return features_BF, self.head(features_BF)


def train(train_images: Images, seed: int = 0, epochs: int = EPOCHS) -> FashionCNN:
    """Cross-entropy with flips and shifts of up to 2 pixels; prints a line an epoch. Seeded: the same again on the same
    machine."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    assert train_images.labels_N is not None
    images_NCHW, labels_N = train_images.images_NCHW, train_images.labels_N
    network = FashionCNN().to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    steps = len(images_NCHW) // BATCH_SIZE
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, epochs * steps)
    for epoch in range(epochs):
        total = torch.zeros(())
        for indices_B in torch.randperm(len(images_NCHW), generator=generator)[: steps * BATCH_SIZE].split(BATCH_SIZE):
            _, logits_BL = network(_flipped_and_shifted(images_NCHW[indices_B], generator))
            loss = F.cross_entropy(logits_BL, labels_N[indices_B])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        print(f"epoch {epoch + 1} of {epochs}: mean loss {float(total) / steps:.4f}", flush=True)
    return network.eval()


def _flipped_and_shifted(images_BCHW: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image mirrored or not, and moved by up to 2 pixels each way within its black border."""
    B, _, H, W = images_BCHW.shape
    rows_BH = torch.arange(H) + torch.randint(2 * SHIFT + 1, (B, 1), generator=generator)
    columns_BW = torch.arange(W) + torch.randint(2 * SHIFT + 1, (B, 1), generator=generator)
    columns_BW = torch.where(torch.rand(B, 1, generator=generator) < 0.5, columns_BW, columns_BW.flip(1))
    padded_BCHW = F.pad(images_BCHW, (SHIFT,) * 4)
    taken_BHWC = padded_BCHW.permute(0, 2, 3, 1)[
        torch.arange(B)[:, None, None], rows_BH[:, :, None], columns_BW[:, None, :]
    ]
    return taken_BHWC.permute(0, 3, 1, 2)


@torch.no_grad()
def accuracy(network: FashionCNN, images: Images, batch_size: int = 500) -> float:
    """Share of a split that is classified right."""
    assert images.labels_N is not None
    logits_NL = torch.cat([network(batch_BCHW)[1] for batch_BCHW in images.images_NCHW.split(batch_size)])
    return float((logits_NL.argmax(1) == images.labels_N).double().mean())


def weights_file() -> Path:
    """The weights that come with this package."""
    return Path(__file__).with_name(f"fashion_cnn-{WEIGHTS_SHA256[:8]}.safetensors")


def load_fashion_cnn() -> FashionCNN:
    """The trained network in eval mode, its gradients off.

    Raises:
        DataError: the weights are absent, or are not the ones that this version of the package names.
    """
    path = weights_file()
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"fashion-cnn's weights {path} cannot be read ({error.strerror}); install ibq again") from None
    if (digest := hashlib.sha256(content).hexdigest()) != WEIGHTS_SHA256:
        raise DataError(
            f"fashion-cnn's weights {path} have sha256 {digest} where {WEIGHTS_SHA256} is expected; install ibq again"
        )
    with torch.device("meta"):  # draws no random numbers, so that an evaluation does not change what comes after it
        network = FashionCNN()
    network.load_state_dict(load_tensors(content), assign=True)
    return network.eval().requires_grad_(False)


def main(folder: str) -> None:
    """Train, measure on the whole test split, write the weights under the name that their hash gives them."""
    started = time.perf_counter()
    network = train(load_fashion_mnist(FASHION_MNIST_RESOLUTION, "train"))
    seconds = time.perf_counter() - started
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    content = save_tensors(tensors)
    digest = hashlib.sha256(content).hexdigest()
    path = Path(folder) / f"fashion_cnn-{digest[:8]}.safetensors"
    path.write_bytes(content)
    test = accuracy(network, load_fashion_mnist(FASHION_MNIST_RESOLUTION, "test"))
    print(f"test accuracy {test:.4f}, {seconds:.0f} s, {len(content) / 1e6:.2f} MB, sha256 {digest}: {path}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else ".")
