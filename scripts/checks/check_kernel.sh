#!/usr/bin/env bash
# The kernel under AddressSanitizer and UBSan, at every width of vectors that this processor has; and NEON under
# qemu-user, where aarch64-linux-gnu-gcc and qemu-aarch64 are (Debian: gcc-aarch64-linux-gnu, qemu-user).
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
flags=(-O2 -g -std=c11 -Wall -Wextra -Werror -ffp-contract=fast -pthread scripts/checks/check_kernel.c -lm)
sanitizers=(-fsanitize=address,undefined -fno-sanitize-recover=all)

check() { # width of vectors, then flags of the compiler
    echo "$1: $(shift; "$@" && "${run[@]}" "$folder/check")"
}

run=(env)
if [ "$(uname -m)" = x86_64 ]; then
    check plain gcc "${sanitizers[@]}" -DLANES=4 -DROWS=3 "${flags[@]}" -o "$folder/check"
    ! grep -qw avx2 /proc/cpuinfo || check avx2 gcc "${sanitizers[@]}" -mavx2 -mfma -DLANES=8 -DROWS=3 "${flags[@]}" -o "$folder/check"
    ! grep -qw avx512f /proc/cpuinfo || check avx512 gcc "${sanitizers[@]}" -mavx512f -DLANES=16 -DROWS=6 "${flags[@]}" -o "$folder/check"
fi
if command -v aarch64-linux-gnu-gcc qemu-aarch64 >/dev/null; then
    run=(qemu-aarch64 -L /usr/aarch64-linux-gnu)
    check neon aarch64-linux-gnu-gcc -DLANES=4 -DROWS=6 "${flags[@]}" -o "$folder/check"
fi
