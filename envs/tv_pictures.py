"""The pictures of `wrappers.NoisyTV`: CIFAR-10 (Krizhevsky 2009), or pictures generated here."""

import functools
import tarfile
import zlib
from pathlib import Path

import numpy as np

from basics import UserError, numpy_rng

SIDE = 32  # pixels of a picture's height and width
CIFAR_AMOUNT = 10_000  # pictures in CIFAR-10's first batch, which is the only one used
BATCH = "data_batch_1.bin"
RECORD = 1 + 3 * SIDE**2  # bytes per picture: its label, then its pixels

GENERATED_AMOUNT = 4096  # generated pictures
CHUNK = 256  # pictures generated at once, to limit memory
WAVES = 6  # summed into a texture
SHAPES = 4  # drawn over it


@functools.cache  # environments in one process share them
def pictures(data: str | None) -> np.ndarray:
    """The pictures, uint8 [N, 32, 32, 3], read only: CIFAR-10 from `data`, or generated if that is None.

    Raises UserError if `data` is not CIFAR-10.
    """
    found = generate(GENERATED_AMOUNT, numpy_rng(0, "tv_pictures")) if data is None else read_cifar10(data)
    found.flags.writeable = False
    return found


def generate(amount: int, random: np.random.Generator) -> np.ndarray:
    """Pictures, uint8 [amount, 32, 32, 3]: coloured shapes on textures and gradients, with some grain."""
    sizes = [min(CHUNK, amount - start) for start in range(0, amount, CHUNK)]
    return np.concatenate([_generate_chunk(size, random) for size in sizes])


def _generate_chunk(n: int, random: np.random.Generator) -> np.ndarray:
    axis = np.linspace(-1, 1, SIDE, dtype=np.float32)
    y, x = np.meshgrid(axis, axis, indexing="ij")  # [32, 32]

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return random.uniform(low, high, (n, *shape)).astype(np.float32)

    def waves(amount: int, low: float, high: float) -> np.ndarray:
        """Sums of plane waves [n, 32, 32] within -1 to 1; slower waves are stronger."""
        frequency = low * (high / low) ** uniform(0, 1, amount)  # [n, waves] radians
        angle, phase = uniform(0, 2 * np.pi, amount), uniform(0, 2 * np.pi, amount)
        weight = 1 / frequency
        weight /= weight.sum(-1, keepdims=True)
        total = np.zeros((n, SIDE, SIDE), np.float32)
        for k in range(amount):
            fy, fx = frequency[:, k] * np.sin(angle[:, k]), frequency[:, k] * np.cos(angle[:, k])
            way = fy[:, None, None] * y + fx[:, None, None] * x + phase[:, k, None, None]
            total += weight[:, k, None, None] * np.sin(way)
        return total

    def mix(under: np.ndarray, over: np.ndarray, share: np.ndarray) -> np.ndarray:
        return under + (over - under) * share[..., None]

    colours = uniform(0, 255, 2 + SHAPES, 1, 1, 3)  # [n, colours, 1, 1, 3]
    texture = waves(WAVES, 1.0, 20.0) * uniform(0.5, 3.0, 1, 1)
    image = mix(colours[:, 0], colours[:, 1], np.clip(0.5 + texture, 0, 1))  # [n, 32, 32, 3]
    for k in range(SHAPES):
        size, turn = uniform(0.15, 0.7, 2, 1, 1), uniform(0, 2 * np.pi, 1, 1)
        dy, dx = y - uniform(-1, 1, 1, 1), x - uniform(-1, 1, 1, 1)
        u = np.abs(dx * np.cos(turn) + dy * np.sin(turn)) / size[:, 0]  # [n, 32, 32]
        v = np.abs(dy * np.cos(turn) - dx * np.sin(turn)) / size[:, 1]
        kind = random.integers(0, 3, (n, 1, 1))
        radius = np.where(kind == 0, np.sqrt(u**2 + v**2), np.where(kind == 1, np.maximum(u, v), u + v))
        edge = uniform(1.0, 12.0, 1, 1)  # from blurred to sharp
        shade = 1 + 0.4 * waves(1, 0.5, 25.0)  # light, or stripes
        shape = np.clip(colours[:, 2 + k] * shade[..., None], 0, 255)
        image = mix(image, shape, np.clip(0.5 + (1 - radius) * edge, 0, 1))
    grain = random.standard_normal(image.shape, np.float32) * uniform(0, 12, 1, 1, 1)
    return np.clip(image + grain, 0, 255).astype(np.uint8)


def read_cifar10(data: str) -> np.ndarray:
    """The first batch of CIFAR-10, uint8 [10000, 32, 32, 3], from `cifar-10-binary.tar.gz` or its folder.

    Raises UserError for anything else.
    """
    path = Path(data)
    try:
        content = _from_folder(path) if path.is_dir() else _from_archive(path)
        if len(content) != CIFAR_AMOUNT * RECORD:
            raise ValueError(f"{BATCH} does not have {CIFAR_AMOUNT * RECORD:,} bytes")
    except FileNotFoundError as error:
        raise UserError(
            f"--noisy_tv.data {data}: no such file or folder. Pass cifar-10-binary.tar.gz, or leave the "
            "option out for generated pictures."
        ) from error
    except (OSError, EOFError, zlib.error, tarfile.TarError, ValueError) as error:
        raise UserError(
            f"--noisy_tv.data {data} is not cifar-10-binary.tar.gz or its folder: {error}. Download it "
            "again, or leave the option out for generated pictures."
        ) from error
    pixels = np.frombuffer(content, np.uint8).reshape(CIFAR_AMOUNT, RECORD)[:, 1:]
    return np.ascontiguousarray(pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))


def _from_folder(folder: Path) -> bytes:
    for path in (folder / BATCH, *folder.glob(f"*/{BATCH}")):
        if path.is_file():
            with open(path, "rb") as file:
                return file.read(CIFAR_AMOUNT * RECORD + 1)
    raise ValueError(f"it has no {BATCH}")


def _from_archive(path: Path) -> bytes:
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            if member.isreg() and member.name.rpartition("/")[2] == BATCH:
                return archive.extractfile(member).read(CIFAR_AMOUNT * RECORD + 1)
    raise ValueError(f"it has no {BATCH}")
