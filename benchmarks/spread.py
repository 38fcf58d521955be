"""Run pytest spread over processes, where pytest-xdist is not installed.

    python -m benchmarks.spread 8 OPTIONS AND FILES OF PYTEST…

Every process takes its share of the tests of every file, so that a run that is cut off has seen
something of each. Exit status 1 if a test fails or a process ends before its time. After Ctrl-C
every process says how far it came.
"""

import contextlib
import subprocess
import sys
import tempfile
import time

PATIENCE = 20.0  # seconds in which a process that was interrupted says how far it came


def collected(command: list[str]) -> list[str]:
    """The tests that pytest would run, by their names."""
    found = subprocess.run([*command, "--collect-only"], capture_output=True, text=True)
    lines = found.stdout.splitlines()
    names = [line for line in lines if line.startswith("tests") and "::" in line]
    if found.returncode or not names:
        sys.exit(f"{found.stdout}{found.stderr}pytest could not collect the tests")
    return names


def main(processes: int, arguments: list[str]) -> int:
    files = [argument for argument in arguments if argument.startswith("tests")]
    options = [argument for argument in arguments if argument not in (*files, "-q")]
    pytest = [sys.executable, "-m", "pytest", "-q", *options]  # -q twice names no test
    names = collected([*pytest, *files])
    shares = [share for i in range(processes) if (share := names[i::processes])]
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in shares]
        # In our process group: what is sent to it reaches them, too.
        started = [
            subprocess.Popen([*pytest, *share], stdout=log, stderr=subprocess.STDOUT)
            for share, log in zip(shares, logs, strict=True)
        ]
        interrupted = False
        try:
            for process in started:
                process.wait()
        except KeyboardInterrupt:
            interrupted = True
            end = time.monotonic() + PATIENCE
            for process in started:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(end - time.monotonic(), 0.1))
        finally:
            for process in started:
                process.kill()
        bad = 0
        for log, process in zip(logs, started, strict=True):
            log.seek(0)
            lines = log.read().splitlines()
            told = [line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))]
            print("\n".join([*told[:20], lines[-1] if lines else "no word"]))
            bad += process.wait() != 0
    print(f"{len(names)} tests in {len(shares)} processes, {bad} of which failed", flush=True)
    return 130 if interrupted else int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
