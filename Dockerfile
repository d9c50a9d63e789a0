# LoRe with its requirements, for CPUs and NVIDIA GPUs. ./start.sh builds and starts it.
FROM python:3.11.14-slim-bookworm

# Software OpenGL for MuJoCo, and a C compiler for torch.compile. Not pinned, since Debian keeps only the
# latest version of a package.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        gcc libc6-dev libegl-mesa0 libegl1 libgl1-mesa-dri libosmesa6 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /lore

# Requirements are installed before the code is copied, so that changes of the code do not install them again.
# On Linux, pip installs PyTorch with CUDA, which also runs on CPUs. For a much smaller image without CUDA, set
# pip's variable PIP_EXTRA_INDEX_URL to PyTorch's index of CPU builds.
ARG PIP_EXTRA_INDEX_URL=
COPY requirements.txt ./
RUN pip install --no-cache-dir -r requirements.txt
# Names of files in requirements/.
ARG EXTRAS="gym minigrid plot"
COPY requirements requirements/
RUN for extra in $EXTRAS; do pip install --no-cache-dir -r "requirements/$extra.txt" || exit 1; done

# Any user can run it: docker-compose.yml sets the owner of the mounted logdir.
RUN useradd --create-home --uid 1000 lore \
    && mkdir logdir \
    && chmod 777 /home/lore /lore logdir
ENV HOME=/home/lore USER=lore
COPY --chmod=755 . .
USER 1000
CMD ["bash"]
