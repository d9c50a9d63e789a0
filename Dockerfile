# LoRe with all that it needs, for a CPU or an NVIDIA GPU: ./start.sh builds and enters it.
FROM python:3.11.14-slim-bookworm

# OpenGL in software for MuJoCo, a C compiler for torch.compile.
# Debian keeps only the latest version of a package, so none is pinned here.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends \
        gcc libc6-dev libegl-mesa0 libegl1 libgl1-mesa-dri libosmesa6 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /lore

# What is installed stands before the code, so that a changed line of code installs nothing anew. On Linux
# pip installs the CUDA build of PyTorch, which runs on a CPU too. For a much smaller image without CUDA, set
# pip's own variable PIP_EXTRA_INDEX_URL to the index of CPU builds that PyTorch's own page names.
ARG PIP_EXTRA_INDEX_URL=
COPY requirements.txt ./
RUN pip install --no-cache-dir -r requirements.txt
# Extras by name, as in requirements/.
ARG EXTRAS="gym minigrid plot"
COPY requirements requirements/
RUN for extra in $EXTRAS; do pip install --no-cache-dir -r "requirements/$extra.txt" || exit 1; done

# Not root: any user may be given, such as the owner of the logdir that is mounted (docker-compose.yml).
RUN useradd --create-home --uid 1000 lore \
    && mkdir logdir \
    && chmod 777 /home/lore /lore logdir
ENV HOME=/home/lore USER=lore
COPY --chmod=755 . .
USER 1000
CMD ["bash"]
