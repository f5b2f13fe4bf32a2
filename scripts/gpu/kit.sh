#!/usr/bin/env bash
# Everything that only a GPU can tell about latentfm, in half an hour on a bare machine without network.
#
#   bash scripts/gpu/kit.sh prepare            here, where latentfm is installed, with pip and npm: packs what is lacking there into build/gpu
#   then copy the repository there with build/gpu (assets/emoji may stay behind), and, in order of worth, run
#   bash scripts/gpu/kit.sh tests              the gpu-marked tests
#   bash scripts/gpu/kit.sh sampling           SD3 medium's sampling beside diffusers; 3.5 medium and large by forward steps
#   bash scripts/gpu/kit.sh training           training beside a plain diffusers loop; the loader's cost; start-up
#   bash scripts/gpu/kit.sh bundled            trains the bundled model, in two calls or three
#   bash scripts/gpu/kit.sh kernels            one step of sampling and of training, as tables of kernels
#   bash scripts/gpu/kit.sh report             README's table from the results; report A B compares two folders of results
#
# Each part ends by itself before KIT_SECONDS (540) are over; exit code 75: run it again, it goes on where it was. What failed is tried
# again by the next call, so a fault can be mended in between; KIT_AGAIN=WORDS measures again what has these words in its name.
# Results: RESULTS (build/gpu/results), one JSON of less than 1 MB and a log for each part; with OUT=FOLDER a copy of them there.
# KIT_SCALE=shrunk runs every part in miniature, on a CPU too: that is how the kit is tested.
set -uo pipefail
cd "$(dirname "$0")/../.."
here=scripts/gpu
python=${PYTHON:-python3}
kit=build/gpu
export RESULTS=${RESULTS:-$kit/results} KIT_SECONDS=${KIT_SECONDS:-540} KIT_SCALE=${KIT_SCALE:-full}

prepare() { # packages for Python KIT_PYTHON (3.12), x86-64 Linux, CUDA KIT_CUDA (130)
    set -e
    version=${KIT_PYTHON:-3.12} cuda=${KIT_CUDA:-130}
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    mkdir -p "$kit"
    platforms=()
    for number in 2_34 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${number}_x86_64"); done
    "$python" -m pip install -q --no-deps --only-binary=:all: --python-version "$version" --implementation cp "${platforms[@]}" \
        --platform manylinux2014_x86_64 --platform manylinux1_x86_64 --no-compile --target "$work/site" -r "$here/requirements.txt"
    # bitsandbytes brings a library for each CUDA and ROCm there is
    find "$work/site/bitsandbytes" -name 'libbitsandbytes_*.so' ! -name "*_cuda$cuda.so" ! -name '*_cpu.so' -delete
    rm -rf "$work"/site/bin "$work"/site/*/tests "$work"/site/share
    tar -C "$work/site" -c . | xz -T0 -6 > "$kit/site.tar.xz"
    "$python" scripts/emoji/build.py --work "$work/emoji" fetch catalogue
    mv "$work/emoji/catalogue.jsonl.gz" "$kit/emoji.jsonl.gz"
    gzip < "$work/emoji/meanings.json" > "$kit/meanings.json.gz"
    rm -rf "$kit/base" # the frozen models of scripts/emoji/build.py, where it has made them, for KIT_FROZEN=packed; else the bundled model's
    if [ -d build/emoji/base ]; then cp -rL build/emoji/base "$kit/base"; fi
    ls -l "$kit"/*.[xg]z
    git ls-files -z | xargs -0 du -cb | awk -v kit="$(du -cb "$kit"/*.[xg]z "$kit"/base 2> /dev/null | awk 'END {print $1}')" '
        $2 == "total" {whole = $1} $2 ~ /^assets\/emoji\// {model += $1}
        END {printf "what travels: %.1f MiB; without assets/emoji %.1f MiB\n", (whole + kit) / 2^20, (whole - model + kit) / 2^20}'
}

unpack() { # once a machine: what is packed goes before what is installed
    if [ -f "$kit/site.tar.xz" ] && [ "${KIT_SITE:-packed}" = packed ]; then
        site=${TMPDIR:-/tmp}/latentfm-site-$(sha256sum "$kit/site.tar.xz" | cut -c1-12)
        if [ ! -f "$site/.done" ]; then
            mkdir -p "$site" && tar -C "$site" -xJf "$kit/site.tar.xz" && touch "$site/.done" || exit 1
        fi
        export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
    fi
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
    export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
}

run() { # a part, started again where a fault ended its process
    part=$1
    script=$here/part_$part.py
    mkdir -p "$RESULTS"
    export KIT_CALL=$(date +%s) KIT_DEADLINE=$(($(date +%s) + KIT_SECONDS))
    unpack
    for turn in 1 2 3 4 5; do
        "$python" "$script" 2>&1 | tee -a "$RESULTS/$part.log"
        code=${PIPESTATUS[0]}
        # 0 done, 1 something of it failed, 2 wrong input, 75 out of time; anything else is a process that was ended
        case $code in 0 | 1 | 2 | 75) break ;; esac
        echo "the process ended with $code; started again ($turn)" | tee -a "$RESULTS/$part.log"
    done
    if [ -n "${OUT:-}" ] && [ "$OUT" != "$RESULTS" ]; then
        mkdir -p "$OUT"
        tail -c 900000 "$RESULTS/$part.log" > "$OUT/$part.log"
        cp "$RESULTS/$part.json" "$OUT/"
        [ "$part" = bundled ] && cp "$RESULTS"/model-*.part "$RESULTS"/progress.png "$OUT/" 2> /dev/null
    fi
    return "$code"
}

case "${1:-}" in
    prepare) prepare ;;
    tests | sampling | training | bundled | kernels) run "$1" ;;
    report) shift; exec "$python" "$here/report.py" "${@:-$RESULTS}" ;;
    *) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
