"""Fine-tune a small vision transformer under a harsh token reduction, 64 to 4 (MCTF, arXiv 2403.10030).

    python docs/examples/mctf_finetune.py            # under a minute on one CPU core, nothing is downloaded

One network, two passes a step: the *student* merges down to the whole reduction, the *teacher* by a small random one;
``consistency_loss`` adds the distance of their class tokens to both cross-entropies. The task is to tell from a small
grey crop which photograph it was cut from; training and test crops come from different bands of the photographs.
The photographs are those that scikit-image ships (``pip install scikit-image``).
"""

from __future__ import annotations

import argparse
import random
import time

import timm
import torch
from skimage import color, data, transform
from torch import Tensor, nn
from torch.nn import functional as F

import vtok
from vtok.methods.mctf import consistency_loss

PHOTOGRAPHS = (
    "brick", "cell", "chelsea", "coins", "grass", "gravel", "hubble_deep_field", "immunohistochemistry", "page", "text",
)  # fmt: skip
CROP, PATCH = 48, 6
TOKENS = (CROP // PATCH) ** 2
MERGING = (0, 1, 2, 3)  # of five blocks: early merging is what costs accuracy, and saves most


def photograph(name: str) -> Tensor:
    """(height, 512) grey values with mean 0 and deviation 1, so that brightness alone gives nothing away."""
    image = getattr(data, name)()
    grey = color.rgb2gray(image[..., :3]) if image.ndim == 3 else image / 255.0
    scaled = transform.resize(grey, (round(grey.shape[0] * 512 / grey.shape[1]), 512), anti_aliasing=True)
    picture = torch.as_tensor(scaled).float()
    return (picture - picture.mean()) / picture.std()


def crops(pictures: list[Tensor], count: int, train: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random crops from the bands of 64 columns that belong to training (even ones) or to the test (odd ones)."""

    def draw(limit: int) -> int:
        return int(torch.randint(limit, (1,), generator=generator))

    images, labels = [], []
    for _ in range(count):
        label = draw(len(pictures))
        picture = pictures[label]
        left = 128 * draw(4) + (0 if train else 64) + draw(64 - CROP + 1)
        top = draw(picture.shape[0] - CROP + 1)
        crop = picture[top : top + CROP, left : left + CROP]
        images.append(crop.flip(1) if train and draw(2) else crop)
        labels.append(label)
    return torch.stack(images)[:, None], torch.tensor(labels)


def small_vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=CROP, patch_size=PATCH, in_chans=1, depth=5, embed_dim=64, num_heads=4,
        num_classes=len(PHOTOGRAPHS),
    )  # fmt: skip


def class_token_and_logits(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    features = model.forward_features(images)
    return features[:, 0], model.forward_head(features)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(128), labels.split(128), strict=True))
    model.train()
    return right / len(labels)


def pretrain(model: nn.Module, pictures: list[Tensor], steps: int, batch: int, generator: torch.Generator) -> float:
    """Ordinary training without any reduction; the mean loss of the last tenth."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, max(steps, 2))
    losses = []
    for _ in range(steps):
        images, labels = crops(pictures, batch, True, generator)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


def finetune(
    model: nn.Module, pictures: list[Tensor], steps: int, batch: int, generator: torch.Generator
) -> tuple[float, float]:
    """Token-reduction consistency; the mean loss of the first and of the last tenth."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, max(steps, 2))
    draw, losses = random.Random(0), []
    for _ in range(steps):
        images, labels = crops(pictures, batch, True, generator)
        student_cls, student = class_token_and_logits(model, images)
        with vtok.budget(model, draw.randint(3 * TOKENS // 4, TOKENS)):  # the teacher merges little, or nothing
            teacher_cls, teacher = class_token_and_logits(model, images)
        loss = consistency_loss(student, teacher, student_cls, teacher_cls, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    part = max(1, steps // 10)
    return sum(losses[:part]) / part, sum(losses[-part:]) / part


def run(
    keep: int = 4, pretrain_steps: int = 150, steps: int = 60, batch: int = 32, test: int = 512, seed: int = 0
) -> dict[str, float]:
    """Train, compress, fine-tune; returns losses and accuracies."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    pictures = [photograph(name) for name in PHOTOGRAPHS]
    images, labels = crops(pictures, test, False, torch.Generator().manual_seed(seed + 1))
    model = small_vit()
    numbers = {"pretraining loss": pretrain(model, pictures, pretrain_steps, batch, generator)}
    numbers["plain accuracy before"] = accuracy(model, images, labels)

    vtok.compress(model, "mctf", keep=keep, layers=MERGING)
    numbers["compressed accuracy before"] = accuracy(model, images, labels)
    first, last = finetune(model, pictures, steps, batch, generator)
    numbers["consistency loss, first steps"], numbers["consistency loss, last steps"] = first, last
    numbers["compressed accuracy after"] = accuracy(model, images, labels)
    numbers["tokens left"] = vtok.report(model).tokens_kept
    vtok.restore(model)
    numbers["plain accuracy after"] = accuracy(model, images, labels)
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a small ViT under MCTF's token reduction.")
    parser.add_argument("--keep", type=int, default=4, help=f"tokens left of {TOKENS} (default 4)")
    parser.add_argument("--pretrain-steps", type=int, default=150, help="steps of ordinary training first")
    parser.add_argument("--steps", type=int, default=60, help="steps of fine-tuning under reduction")
    parser.add_argument("--batch", type=int, default=32, help="crops a step")
    parser.add_argument("--test", type=int, default=512, help="test crops")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    numbers = run(options.keep, options.pretrain_steps, options.steps, options.batch, options.test, options.seed)
    numbers["seconds"] = time.perf_counter() - start
    for name, value in numbers.items():
        print(f"{name:<30} {value:8.3f}")  # noqa: T201


if __name__ == "__main__":
    main()
