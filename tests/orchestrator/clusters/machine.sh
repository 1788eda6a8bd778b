# One machine of test_flagship.py, in namespaces of its own; $1 is its folder, $2 its address.
set -euo pipefail
ip link set lo up
until ip link show eth0 > /dev/null 2>&1; do sleep 0.05; done
ip addr add "$2/24" dev eth0
ip link set eth0 up
mount -t tmpfs -o size=2g tmpfs /dev/shm
mkdir -p /tmp/ray /run/sshd
mount --bind "$1/ray" /tmp/ray
# Which processes show the token to whoever may look: their command lines and environments.
while sleep 0.5; do
  grep -l -a -f "$1/../pattern" /proc/[0-9]*/cmdline /proc/[0-9]*/environ >> "$1/shown.txt" 2> /dev/null || true
done &
exec "$(command -v sshd)" -D -e -f "$1/sshd_config" 2> "$1/sshd.txt"
