# Runs on every host at each of its starts: fetches the code, installs it and
# becomes the worker. launch/script.py writes the settings above.
#
#   GSAE_BUCKET GSAE_OBJECT  where the code is, the object's name quoted for a URL
#   GSAE_LOGS                name of the folder for what goes wrong here, quoted too
#   GSAE_STATE               name of what says how far the run is, quoted too
#   GSAE_ID                  of the code
#   GSAE_DATE                packages are those of that day, at every start
#   GSAE_EXTRAS              of the package
#   GSAE_WORKER              arguments of launch.worker
set -Eeuo pipefail

home="${GSAE_HOME:-/opt/gsae}"
code="$home/$GSAE_ID"
metadata="http://${GCE_METADATA_HOST:-metadata.google.internal}/computeMetadata/v1"
storage="${STORAGE_EMULATOR_HOST:-https://storage.googleapis.com}"
uv_version=0.13.9
python_version=3.12

# Tokens go to curl by pipes: arguments are for every user of a machine to see.
authorization() {
  local token
  token=$(curl -fsS -H 'Metadata-Flavor: Google' \
    "$metadata/instance/service-accounts/default/token" |
    sed -E 's/.*"access_token": *"([^"]+)".*/\1/') &&
    echo "Authorization: Bearer $token"
}

# The network and the account may come up after this script.
patiently() {
  local wait
  for wait in 1 2 4 8 16 32 64; do
    if "$@"; then return; fi
    echo "$1 failed; again in $wait s"
    sleep "$wait"
  done
  "$@"
}

fetch() {
  local header
  header=$(authorization) &&
    curl -fsS -H @- -o "$code.tar.gz" \
      "$storage/storage/v1/b/$GSAE_BUCKET/o/$GSAE_OBJECT?alt=media" <<<"$header"
}

get_uv() {
  curl -fsSL "https://astral.sh/uv/$uv_version/install.sh" |
    env UV_INSTALL_DIR="$home/bin" UV_NO_MODIFY_PATH=1 sh
}

install() {
  export PATH="$home/bin:$PATH" UV_PYTHON_INSTALL_DIR="$home/python"
  command -v uv || patiently get_uv
  patiently uv venv --allow-existing --python "$python_version" "$code/.venv"
  patiently uv pip install --python "$code/.venv/bin/python" \
    --exclude-newer "$GSAE_DATE" --editable "${code}[$GSAE_EXTRAS]"
}

# Of a type, to an object, what comes in.
upload() {
  curl -fsS -H @<(authorization) -H "Content-Type: $1" \
    --data-binary @- -o /dev/null \
    "$storage/upload/storage/v1/b/$GSAE_BUCKET/o?uploadType=media&name=$2" ||
    true
}

report() {
  cat "$home/startup.log" >&3
  upload text/plain "$GSAE_LOGS%2F$(hostname).log" <"$home/startup.log"
  # So that `watch` ends, and deletes the machines.
  printf '{"state": "failed", "step": "startup", "reason": "%s", "time": "%s"}\n' \
    "logs/startup/$(hostname).log says why" "$(date -u +%Y-%m-%dT%H:%M:%SZ)" |
    upload application/json "$GSAE_STATE"
}

mkdir -p "$home"
exec 3>&1 >"$home/startup.log" 2>&1
trap report ERR
if [[ ! -e "$code/installed" ]]; then
  patiently fetch
  mkdir -p "$code"
  tar -xzf "$code.tar.gz" -C "$code"
  install
  touch "$code/installed"
fi
trap - ERR
exec 1>&3 2>&3 3>&-
cd "$code"
# In place of this shell, which would keep signals to itself.
exec "$code/.venv/bin/python" -m launch.worker "${GSAE_WORKER[@]}"
