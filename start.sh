#!/usr/bin/env bash
# Builds the image, starts the container and TensorBoard, and enters: ./start.sh
# With a command, runs that in it instead:  ./start.sh python3 dreamer.py --configs crafter lore_full
# To stop:  docker compose down
set -euo pipefail
cd "$(dirname "$0")"

fail() {
  echo "error: $1" >&2
  exit 2
}

command -v docker >/dev/null || fail "Docker is not installed: see its own page for your system."
docker compose version >/dev/null 2>&1 || fail "Docker has no 'compose': install its Compose plugin."
runtimes=$(docker info --format '{{json .Runtimes}}' 2>/dev/null) ||
  fail "Docker does not answer: start it, or ask for the right to use it (the group docker)."

# Not made by Docker, which would make it root's.
mkdir -p logdir
LORE_USER=$(id -u):$(id -g)
export LORE_USER

if nvidia-smi >/dev/null 2>&1; then
  if [[ $runtimes == *'"nvidia"'* ]]; then
    export LORE_RUNTIME=nvidia
  else
    echo "There is a GPU, but Docker cannot use it: install the NVIDIA Container Toolkit. Going on without."
  fi
fi

docker compose build
docker compose up --detach
echo "TensorBoard: http://127.0.0.1:${TENSORBOARD_PORT:-6006}. To stop everything: docker compose down"

terminal=()
[[ -t 0 && -t 1 ]] || terminal=(--no-TTY)
exec docker compose exec ${terminal[@]+"${terminal[@]}"} lore "${@:-bash}"
