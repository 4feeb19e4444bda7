#!/usr/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
#
# Process 1 of a lab guest: a dozen mounts, the functions to their driver, one command, power off.
#
# Serial ports: ttyS0 console · ttyS1 the command's output, raw · ttyS2 what happened, as records
# (holdfast/lab/ports.py) · ttyS3 questions to the host. A record that does not come is how the
# host notices that something is wrong, so nothing here tries hard to go on.

PATH=/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin
export PATH HOME=/root LANG=C.UTF-8

chmod 755 /
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /dev/shm /dev/pts /dev/hugepages
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp && chmod 1777 /tmp
mount -t tmpfs -o mode=755 tmpfs /run && mkdir -m 711 /run/user && mkdir -m 700 /run/user/0
mount -t devpts devpts /dev/pts
# Kernels may lack these.
mount -t debugfs debugfs /sys/kernel/debug 2>/dev/null
mount -t cgroup2 cgroup2 /sys/fs/cgroup 2>/dev/null
mount -t hugetlbfs hugetlbfs /dev/hugepages 2>/dev/null
ip link set lo up 2>/dev/null
hostname lab

stty raw -echo </dev/ttyS1
stty raw -echo </dev/ttyS2
stty raw -echo </dev/ttyS3
exec 5>/dev/ttyS2
echo started >&5

fail() {
    echo "failed $*" >&5
    exec 5>&-
    poweroff -f
}

# DRIVER, MODULES and FUNCTIONS ("name path" a line); then the command's environment is its own.
. /lab/settings
for module in $MODULES; do
    modprobe "$module" 2>/dev/null
done
FOUND=
while read -r name path; do
    [ -n "$name" ] || continue
    set -- $path
    [ -e "$1/vendor" ] || fail "function $name is not at $path"
    address=${1##*/}
    FOUND="$FOUND${FOUND:+,}$name=$address"
    [ "$DRIVER" = none ] && continue
    echo "$DRIVER" >"$1/driver_override"
    [ -e "$1/driver" ] && echo "$address" >"$1/driver/unbind"
    echo "$address" >/sys/bus/pci/drivers_probe
    bound=$(readlink "$1/driver")
    [ "${bound##*/}" = "$DRIVER" ] || fail "$DRIVER does not take $name at $address"
done <<END
$FUNCTIONS
END
export HOLDFAST_LAB_FUNCTIONS="$FOUND"
mkdir -p /results

# The output goes through a pipe, so that programs see no terminal and the bytes arrive as they are.
mkfifo /run/output
cat /run/output >/dev/ttyS1 &
copier=$!
cd /work
# In a subshell, so that "Killed" and the like, which this shell says, are not put among it.
( exec sh /lab/command ) </dev/null >/run/output 2>&1
status=$?
# A process the command left behind may keep the pipe open; its output is nobody's any more.
for _ in 1 2 3 4 5 6 7 8 9 10; do
    kill -0 $copier 2>/dev/null || break
    sleep 0.1
done
kill $copier 2>/dev/null
wait $copier

dmesg >/results/dmesg.txt
tar -cf /run/results.tar -C /results . || fail "the results cannot be packed"
echo "exit $status" >&5
echo "results $(stat -c %s /run/results.tar)" >&5
cat /run/results.tar >&5
echo end >&5
exec 5>&-
poweroff -f
