#!/bin/busybox sh
# First program of the lab's guests: loads the drivers, then serves commands of the host on the channel that the kernel
# command line names (rmr.agent=NAME of a virtio-serial port, or a console such as hvc0).
# Host to guest, one line each: ID BASE64(script). Guest to host, one JSON object per line, in order of completion:
# {"ready":…} at each start, {"id":…,"exit":…,"stdout":BASE64,"stderr":BASE64} for each command. Commands run concurrently.
/bin/busybox mkdir -p /proc /sys /dev /run /tmp /mnt /sbin
/bin/busybox --install -s /bin
# The image's own programs go before busybox' smaller ones of the same name.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
mkdir /dev/shm
mount -t tmpfs tmpfs /dev/shm
while read -r module; do
	insmod "/modules/$module" || echo "rmr-init: $module was not loaded"
done </modules/order

agent=
for word in $(cat /proc/cmdline); do
	case $word in rmr.agent=*) agent=${word#rmr.agent=} ;; esac
done

find_channel() {
	for port in /sys/class/virtio-ports/*; do
		[ "$(cat "$port/name" 2>/dev/null)" = "$agent" ] && echo "/dev/${port##*/}" && return
	done
	[ -c "/dev/$agent" ] && echo "/dev/$agent"
}

answer() {
	(
		flock 9
		echo "$1" >&3
	) 9>/run/answering
}

execute() {
	directory=/run/command-$1
	mkdir "$directory"
	echo "$2" | base64 -d >"$directory/script"
	cd /tmp
	# Not busybox' shell: it takes its own applets before the programs in PATH.
	dash "$directory/script" </dev/null >"$directory/stdout" 2>"$directory/stderr" 3>&-
	code=$?
	answer "{\"id\":$1,\"exit\":$code,\"stdout\":\"$(base64 -w 0 "$directory/stdout")\",\"stderr\":\"$(base64 -w 0 "$directory/stderr")\"}"
	rm -r "$directory"
}

tries=0
until channel=$(find_channel) && [ -n "$channel" ]; do
	tries=$((tries + 1))
	if [ $tries -gt 100 ]; then
		echo "rmr-init: no channel '$agent' to the host"
		poweroff -f
	fi
	sleep 0.1
done
case $channel in /dev/hvc* | /dev/tty*) stty -F "$channel" raw -echo ;; esac
exec 3<>"$channel"
answer "{\"ready\":\"$(uname -r)\"}"
# A read fails while the host end is not connected; the host connects once and for all right after the start.
while :; do
	while read -r id script <&3; do
		execute "$id" "$script" &
	done
	sleep 0.1
done
