#!/bin/sh
# Installs what tests, demonstration and benchmark need on Debian 12; does nothing, and needs no network, when all is there.
#   install-deps.sh          all of it
#   install-deps.sh build    only what building needs, and so all that the demonstration needs
# Works as root or through sudo. QEMU comes from bookworm-backports (version 10) when that can be reached, without adding it
# to the machine's own package sources; else from Debian 12 itself (7.2), whose storage daemon is a weaker peer in benchmarks.
set -eu

qemu_packages="qemu-system-x86 qemu-system-common qemu-utils"
build_packages="build-essential pkg-config libibverbs-dev librdmacm-dev libclang-dev"
test_packages="busybox-static kmod cpio fio e2fsprogs util-linux procps nbdkit iproute2 git ca-certificates \
	ibverbs-providers ibverbs-utils rdmacm-utils"

say() { echo "install-deps: $*"; }
die() {
	echo "install-deps: $*" >&2
	exit 1
}

# Version of an installed package; empty if it is not installed.
version_of() {
	dpkg-query -W -f '${db:Status-Status} ${Version}' "$1" 2>/dev/null | sed -n 's/^installed //p'
}

# Those of the packages given that are not installed.
missing_of() {
	for package in "$@"; do
		[ -n "$(version_of "$package")" ] || echo "$package"
	done | tr '\n' ' '
}

# Whether all packages of QEMU that are wanted are there, in one version of at least 10.
qemu_is_complete() {
	[ -n "$qemu_packages" ] || return 0
	versions=$(for package in $qemu_packages; do version_of "$package" | grep . || echo none; done | sort -u)
	[ "$(echo "$versions" | wc -l)" = 1 ] && [ "$versions" != none ] && dpkg --compare-versions "$versions" ge 1:10
}

# Whether the package lists know the kernel of the guests, if guests are wanted.
kernel_is_listed() {
	[ -z "$qemu_packages" ] || apt-cache show linux-image-amd64 >/dev/null 2>&1
}

command -v dpkg-query >/dev/null && command -v apt-get >/dev/null || die "this is no Debian: apt-get and dpkg are missing"

case "${1:-all}" in
build) packages=$build_packages qemu_packages= ;;
all) packages="$build_packages $test_packages" ;;
*) die "expected nothing or 'build', found '$1'" ;;
esac
PATH=$PATH:$HOME/.cargo/bin
command -v cargo >/dev/null || die "cargo is missing: install Rust 1.88 or later first (https://rustup.rs)"

release=$(. /etc/os-release && echo "${VERSION_CODENAME:-unknown}")
missing=$(missing_of $packages)
if [ -z "$missing" ] && qemu_is_complete && kernel_is_listed; then
	exit 0
fi

if [ "$(id -u)" = 0 ]; then
	as_root=
elif command -v sudo >/dev/null; then
	as_root=sudo
else
	die "packages are missing ($missing$qemu_packages): run me as root, or install sudo"
fi
install() {
	$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
		-o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=120 "$@" >/dev/null
}

# The guests' kernel is downloaded by the tests, from the same lists.
say "updating the package lists"
if ! $as_root apt-get update -qq; then
	[ -n "$missing$(missing_of $qemu_packages)" ] || exit 0
	die "the package lists cannot be updated; is the network there?"
fi
if [ -n "$missing" ]; then
	say "installing $missing"
	install $missing
fi

if [ -n "$(missing_of $qemu_packages)" ] && [ "$release" != bookworm ]; then
	say "installing QEMU"
	install $qemu_packages
elif [ "$release" = bookworm ] && ! qemu_is_complete; then
	keyring=/usr/share/keyrings/debian-archive-keyring.gpg
	work=$(mktemp -d)
	trap '$as_root rm -rf "$work"' EXIT
	mkdir -p "$work/lists/partial"
	# apt reads and fetches as its own user.
	chmod -R a+rX "$work"
	# Libraries that QEMU needs come from where the machine gets everything else.
	[ ! -f /etc/apt/sources.list ] || cat /etc/apt/sources.list >"$work/sources.list"
	echo "deb [signed-by=$keyring] http://deb.debian.org/debian bookworm-backports main" >>"$work/sources.list"
	private="-o Dir::Etc::SourceList=$work/sources.list -o Dir::State::Lists=$work/lists -o APT::Sandbox::User=root"
	say "installing QEMU from bookworm-backports"
	if $as_root apt-get update -qq $private &&
		install $private -t bookworm-backports $qemu_packages; then
		:
	elif [ -n "$(missing_of $qemu_packages)" ]; then
		say "bookworm-backports cannot be used; installing Debian 12's own QEMU"
		# In one step and down from any newer version, so that nothing of another version blocks the rest.
		install --allow-downgrades $(for package in $qemu_packages qemu-system-data seabios; do echo "$package/bookworm"; done)
	else
		say "bookworm-backports cannot be used; QEMU stays at $(version_of qemu-system-x86)"
	fi
fi

[ -n "$qemu_packages" ] || exit 0
for program in qemu-system-x86_64 qemu-storage-daemon nbdkit fio busybox cpio depmod mkfs.ext4 blkdiscard rdma rping; do
	PATH=$PATH:/usr/sbin:/sbin command -v $program >/dev/null || die "$program is still missing after the installation"
done
say "done; QEMU is $(version_of qemu-system-x86)"
