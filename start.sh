#!/usr/bin/env bash
# Build the image, start the container and TensorBoard, and open a shell:  ./start.sh
# Run a command in the container instead:  ./start.sh python3 dreamer.py --configs crafter lore_full
# Stop both:  docker compose down
set -euo pipefail
cd "$(dirname "$0")"

fail() {
  echo "error: $1" >&2
  exit 2
}

command -v docker >/dev/null || fail "Docker is not installed: https://docs.docker.com/get-docker/"
docker compose version >/dev/null 2>&1 || fail "'docker compose' does not work: install Docker's Compose plugin."
runtimes=$(docker info --format '{{json .Runtimes}}' 2>/dev/null) ||
  fail "Docker does not answer: start it, or let your user join the group docker."

# If Docker created it, it would belong to root.
mkdir -p logdir
LORE_USER=$(id -u):$(id -g)
export LORE_USER

if nvidia-smi >/dev/null 2>&1; then
  if [[ $runtimes == *'"nvidia"'* ]]; then
    export LORE_RUNTIME=nvidia
  else
    echo "Docker cannot use the GPU, so this runs on the CPU. For the GPU, install the NVIDIA Container Toolkit."
  fi
fi

docker compose build
docker compose up --detach
echo "TensorBoard: http://127.0.0.1:${TENSORBOARD_PORT:-6006}. To stop: docker compose down"

terminal=()
[[ -t 0 && -t 1 ]] || terminal=(--no-TTY)
exec docker compose exec ${terminal[@]+"${terminal[@]}"} lore "${@:-bash}"
