#!/usr/bin/env bash
# Runs the kernels (driver.cpp) under AddressSanitizer + UndefinedBehaviorSanitizer and under ThreadSanitizer.
# CXX chooses the compiler and PYTHON the Python, which needs setuptools: setup.py knows the instruction sets.
set -euo pipefail
cd "$(dirname "$0")/../.."
compiler=${CXX:-g++}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${PYTHON:-python3}" - >"$work/sets" <<'END'
import runpy

import setuptools

setuptools.setup = lambda **_: None
for name, flags in runpy.run_path("setup.py")["INSTRUCTION_SETS"].items():
    print(name, *flags)
END

check() { # name, flags
    echo "== $1: $2"
    local flags="-std=c++17 -O1 -g -fno-omit-frame-pointer -Wall -Wextra -pthread $2" jobs=() name set
    mkdir "$work/$1"
    while read -r name set; do
        # shellcheck disable=SC2086
        $compiler $flags $set -DFASTNCA_ISA="$name" -c csrc/kernels.cpp -o "$work/$1/$name.o" &
        jobs+=($!)
    done <"$work/sets"
    # shellcheck disable=SC2086
    $compiler $flags -c csrc/dispatch.cpp -o "$work/$1/dispatch.o" &
    jobs+=($!)
    # shellcheck disable=SC2086
    $compiler $flags -c tests/sanitize/driver.cpp -o "$work/$1/driver.o" &
    jobs+=($!)
    for job in "${jobs[@]}"; do wait "$job"; done
    # shellcheck disable=SC2086
    $compiler $flags "$work/$1"/*.o -o "$work/$1/driver"
    "$work/$1/driver"
}

# ThreadSanitizer's own memory leaves no room for the address space of the far tiles.
check address "-fsanitize=address,undefined -fno-sanitize-recover=all -DFASTNCA_TEST_FAR_TILES"
check thread "-fsanitize=thread"
