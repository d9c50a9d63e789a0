"""The pictures that the television of `wrappers.NoisyTV` shows: CIFAR-10, or pictures generated here.

CIFAR-10 (Krizhevsky 2009) is read from its original archive, `cifar-10-binary.tar.gz` or
`cifar-10-python.tar.gz`, or from the folder that is in it. Nothing is unpacked to the disk, nothing is read
beyond the sizes of the original, and no pickle is executed.
"""

import functools
import gzip
import io
import itertools
import pickletools
import tarfile
import zlib
from pathlib import Path

import numpy as np

from basics import UserError, numpy_rng

SIDE = 32  # pixels of a picture's height and of its width
CIFAR_AMOUNT = 10_000  # pictures of CIFAR-10's first batch, which are all that is read of it
BATCH = "data_batch_1"  # of the python version; that of the binary version is called .bin
BINARY_RECORD = 1 + 3 * SIDE**2  # bytes of a picture in the binary version: its label, then its pixels
MAX_BATCH = 32 * 2**20  # bytes of a batch's file; the python version, with labels and file names, has 31.0e6
MAX_ARCHIVE = 256 * 2**20  # bytes of all that an archive holds; CIFAR-10 has 186e6
MAX_MEMBERS = 100  # files and folders that are looked at in an archive; CIFAR-10 has 9

GENERATED_AMOUNT = 4096  # pictures that are generated
CHUNK = 256  # of them at once, to take little memory
WAVES = 6  # summed to a texture
SHAPES = 4  # on top of it


@functools.cache  # environments in one process share them
def pictures(data: str | None) -> np.ndarray:
    """The television's programme, uint8 [N, 32, 32, 3], read only: CIFAR-10 from `data`, else generated.

    Raises UserError where `data` is not CIFAR-10.
    """
    found = generate(GENERATED_AMOUNT, numpy_rng(0, "tv_pictures")) if data is None else read_cifar10(data)
    found.flags.writeable = False
    return found


# --- Generated pictures --------------------------------------------------------------------------------


def generate(amount: int, random: np.random.Generator) -> np.ndarray:
    """Pictures, uint8 [amount, 32, 32, 3]: coloured shapes on textures and gradients, a little grainy."""
    sizes = [min(CHUNK, amount - start) for start in range(0, amount, CHUNK)]
    return np.concatenate([_generate_chunk(size, random) for size in sizes])


def _generate_chunk(n: int, random: np.random.Generator) -> np.ndarray:
    axis = np.linspace(-1, 1, SIDE, dtype=np.float32)
    y, x = np.meshgrid(axis, axis, indexing="ij")  # [32, 32]

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return random.uniform(low, high, (n, *shape)).astype(np.float32)

    def waves(amount: int, low: float, high: float) -> np.ndarray:
        """Sums of plane waves of any direction, [n, 32, 32] within -1 to 1; the slower, the stronger."""
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


# --- CIFAR-10 ------------------------------------------------------------------------------------------


def read_cifar10(data: str) -> np.ndarray:
    """The first batch of CIFAR-10, uint8 [10000, 32, 32, 3], from the original archive or its folder.

    Raises UserError for anything else.
    """
    path = Path(data)
    try:
        if path.is_dir():
            name, content = _from_folder(path)
        else:
            name, content = _from_archive(path)
        pixels = _from_binary(content) if name.endswith(".bin") else _from_pickle(content)
    except FileNotFoundError as error:
        raise UserError(
            f"--noisy_tv.data {data}: there is no such file or folder. Give cifar-10-binary.tar.gz, or leave "
            "it out for generated pictures."
        ) from error
    except (OSError, EOFError, zlib.error, tarfile.TarError, ValueError, OverflowError) as error:
        raise UserError(
            f"--noisy_tv.data {data} is not CIFAR-10's original archive or its folder: {error}. Get "
            "cifar-10-binary.tar.gz anew, or leave the option out for generated pictures."
        ) from error
    return np.ascontiguousarray(pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))


def _from_folder(folder: Path) -> tuple[str, bytes]:
    """Name and content of the first batch in a folder, or in the folder that the archive has in it."""
    found = [path for name in (f"{BATCH}.bin", BATCH) for path in (folder / name, *folder.glob(f"*/{name}"))]
    found = [path for path in found if path.is_file()]
    if not found:
        raise ValueError(f"it has neither {BATCH}.bin nor {BATCH}")
    with open(found[0], "rb") as file:
        return found[0].name, _bounded(file.read(MAX_BATCH + 1), MAX_BATCH, found[0].name)


def _from_archive(path: Path) -> tuple[str, bytes]:
    """Name and content of the first batch in a .tar.gz, read in memory."""
    with gzip.open(path) as file:
        content = _bounded(file.read(MAX_ARCHIVE + 1), MAX_ARCHIVE, "the archive")
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
        # Bounded, for a member of negative size leads tarfile back to where it was, again and again.
        for member in itertools.islice(archive, MAX_MEMBERS):
            name = member.name.rpartition("/")[2]
            if name in (BATCH, f"{BATCH}.bin") and member.isreg():
                return name, _bounded(archive.extractfile(member).read(MAX_BATCH + 1), MAX_BATCH, name)
    raise ValueError(f"it has neither {BATCH}.bin nor {BATCH}")


def _bounded(content: bytes, limit: int, what: str) -> bytes:
    if len(content) > limit:
        raise ValueError(f"{what} has more than {limit / 2**20:.0f} MiB")
    return content


def _from_binary(content: bytes) -> np.ndarray:
    """Pixels [10000, 3072] of the binary version: records of a label and the colours' planes."""
    if len(content) != CIFAR_AMOUNT * BINARY_RECORD:
        expected = f"{CIFAR_AMOUNT * BINARY_RECORD:,} bytes"
        raise ValueError(f"{BATCH}.bin has {len(content):,} bytes in place of {expected}")
    return np.frombuffer(content, np.uint8).reshape(CIFAR_AMOUNT, BINARY_RECORD)[:, 1:]


def _from_pickle(content: bytes) -> np.ndarray:
    """Pixels [10000, 3072] of the python version: a pickle by Python 2, whose instructions are only read.

    An unpickler, also one that knows few classes, does what a file says. `genops` does nothing: it splits the
    pickle into instructions. One of them holds all pixels as a string, and the one before it says in which
    order they lie: of an array's state (version, shape, dtype, is_fortran, bytes) they are the last two.
    """
    size = CIFAR_AMOUNT * (BINARY_RECORD - 1)
    before = ""
    for opcode, value, _ in pickletools.genops(content):
        if opcode.name == "BINSTRING" and len(value) == size:
            order = "F" if before == "NEWTRUE" else "C"
            pixels = np.frombuffer(value.encode("latin-1"), np.uint8)  # genops decodes bytes as latin-1
            return pixels.reshape(CIFAR_AMOUNT, -1, order=order)
        before = opcode.name
    raise ValueError(f"{BATCH} does not hold {CIFAR_AMOUNT:,} pictures of {SIDE}x{SIDE} pixels")
