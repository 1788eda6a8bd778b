# One machine of test_flagship.py, in namespaces of its own: its folder, its address, and the folders
# of the Python that it borrows.
set -euo pipefail
folder=$1 address=$2
shift 2
ip link set lo up
until ip link show eth0 > /dev/null 2>&1; do sleep 0.05; done
ip addr add "$address/24" dev eth0
ip link set eth0 up
ip route add default via 10.77.0.1  # nobody answers there; Ray takes its own address from it
mount -t tmpfs -o size=2g tmpfs /dev/shm
mkdir -p /tmp/ray /run/sshd
mount --bind "$folder/ray" /tmp/ray
# An empty home: ssh finds it by the user's name, whatever HOME says.
home=$(getent passwd "$(id -u)" | cut -d: -f6)
for path in "$@"; do
  case $path in
    "$home"/*)
      mkdir -p "$folder/home${path#"$home"}"
      mount --bind "$path" "$folder/home${path#"$home"}"
      ;;
  esac
done
mount --rbind "$folder/home" "$home"
# Which processes show the token to whoever may look: their command lines and environments.
while sleep 0.5; do
  grep -l -a -f "$folder/../pattern" /proc/[0-9]*/cmdline /proc/[0-9]*/environ >> "$folder/shown.txt" 2> /dev/null || true
done &
exec "$(command -v sshd)" -D -e -f "$folder/sshd_config" 2> "$folder/sshd.txt"
