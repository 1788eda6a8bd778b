# What test_ray_up.py does in its namespace; the working directory is a scratch one, HOME below it.
set -euo pipefail
ip link set lo up
mount -t tmpfs -o size=4g tmpfs /dev/shm
# Where Ray notes which cluster is here; not all of /tmp, where this checkout may lie.
mkdir -p /tmp/ray "$PWD/ray"
mount --bind "$PWD/ray" /tmp/ray

say() { printf '%4ds %s\n' "$SECONDS" "$*"; }

# A machine that lets its user in by key.
ssh-keygen -q -t ed25519 -N '' -f "$HOME/.ssh/id_ed25519"
cp "$HOME/.ssh/id_ed25519.pub" "$HOME/.ssh/authorized_keys"
ssh-keygen -q -t ed25519 -N '' -f "$HOME/host_key"
mkdir -p /run/sshd
cat > "$HOME/sshd_config" <<EOF
HostKey $HOME/host_key
AuthorizedKeysFile $HOME/.ssh/authorized_keys
ListenAddress 127.0.0.1
StrictModes no
UsePAM no
PidFile none
SetEnv HOME=$HOME
EOF
"$(command -v sshd)" -f "$HOME/sshd_config"

# What the wheel and a login shell bring on a real one.
cat > "$HOME/.bashrc" <<EOF
export HOME=$HOME PATH=$PYTHON_BIN:\$PATH PYTHONPATH=$ROOT HF_HUB_OFFLINE=1
EOF
ray get-auth-token --generate > "$HOME/token.txt"
chmod 600 "$HOME/.ray/auth_token"
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 PYTHONPATH=$ROOT

"$PYTHON_BIN/python" - "$ROOT" "$HOME" <<'EOF'
"""examples/clusters/single-node.yaml, with this machine in it and this checkout as the wheel."""
import pathlib
import sys
import yaml

root, home = map(pathlib.Path, sys.argv[1:])
file = yaml.safe_load((root / "examples/clusters/single-node.yaml").read_text())
file["provider"]["head_ip"] = "127.0.0.1"
file["auth"] = {"ssh_user": "root", "ssh_private_key": str(home / ".ssh/id_ed25519")}
file["file_mounts"] = {}  # the same home on both sides: the token is there already
file["setup_commands"] = [f"bash -c 'command -v compress-cluster' > {home}/installed.txt"]
# Ray gets its token mode from .bashrc on a real one; see setup_commands.
(home / "cluster.yaml").write_text(yaml.safe_dump(file, sort_keys=False))
EOF
echo 'export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0' >> "$HOME/.bashrc"

say "ray up"
ray up -y --no-config-cache "$HOME/cluster.yaml"
say "submit"
compress-cluster submit tiny --device cpu --slice 0.25 --calibration-sequences 8 \
  --evaluation-sequences 8 --out "$HOME/run"
compress-cluster logs "$HOME/run" --follow
compress-cluster status "$HOME/run" --json > "$HOME/../status.json"
test -e "$HOME/run/READY"
say "ray down"
ray down -y "$HOME/cluster.yaml"
say "done"
