"""Trains a Llama with LORENZA in several processes, each with its own part of the text.

    python examples/distributed.py                           # 2 processes on this machine's CPUs
    python examples/distributed.py --processes 4 --layout fsdp --steps 100
    python examples/distributed.py --resume                  # go on after an interruption

One script plays both parts. The launcher starts the processes and watches them: if one dies, the
others, which would wait for it for ever, are ended too, and it says how to go on. The processes
find each other with `jax.distributed` and then run the program of a single one: arrays are global,
`jit` divides the work (GSPMD), and nothing of it is said to the optimizer. Checkpoints are Orbax's,
written by all processes together; a resumed run has the same bits as one that was never broken.
"""

import argparse
import hashlib
import json
import os
import pathlib
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy

import run_record

LAYOUTS = ("data-parallel", "fsdp")
# What a resumed run may change: its learning rate is constant, so it may also take more steps.
FREE_ON_RESUME = {"steps", "out", "checkpoint_every", "resume", "process_id", "coordinator"}
GRACE = 5  # seconds that the other processes have to end by themselves


def parse_arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, positive = parser.add_argument, run_record.positive
    add("--processes", type=positive, default=2)
    add("--layout", choices=LAYOUTS, default="data-parallel",
        help="a copy of the parameters in each process, or a part of each of them")  # fmt: skip
    add("--preset", default="nano", help="model size, see llama.py")
    add("--steps", type=positive, default=20)
    add("--batch-size", type=positive, default=4, help="sequences of each process")
    add("--lr", type=float, default=1e-2)
    add("--rho", type=float, default=0.05, help="radius of the perturbation")
    add("--update-proj-gap", type=int, default=4, help="steps from one subspace to the next")
    add("--data", help="a text file or a folder (default: the source text of Python's library)")
    add("--seed", type=int, default=0)
    add("--out", type=pathlib.Path, default=pathlib.Path("runs/distributed"), help="run folder")
    add("--checkpoint-every", type=positive, default=5, help="steps between checkpoints")
    add("--resume", action="store_true", help="go on from the latest checkpoint in --out")
    add("--process-id", type=int, help=argparse.SUPPRESS)  # set by the launcher
    add("--coordinator", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


# The launcher. It imports no JAX: the processes do.


def launch(argv, arguments):
    """Runs all processes to their end; the exit status of the script."""
    folder = arguments.out
    run_record.check(arguments, FREE_ON_RESUME)
    if not arguments.resume:
        if checkpoint_steps(folder) or is_of_another_program(folder):
            raise SystemExit(f"{folder} holds a run already. Give --resume, or another --out.")
        folder.mkdir(parents=True, exist_ok=True)
        run_record.write(arguments)
    for old in folder.glob("result-*.json"):
        old.unlink()
    with socket.socket() as probe:  # a free port, which the first process will listen at
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    processes = []
    try:
        for number in range(arguments.processes):
            command = [sys.executable, __file__, *argv, "--process-id", str(number)]
            with (folder / f"process-{number}.log").open("w") as log:
                # The pipe stays open as long as the launcher lives: see `end_with_launcher`.
                process = subprocess.Popen(
                    [*command, "--coordinator", coordinator], stdin=subprocess.PIPE, stderr=log
                )
            processes.append(process)
            print(f"process {number}: started (pid {process.pid})", flush=True)
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):
                break
            time.sleep(0.1)
        dead = [(number, p.poll()) for number, p in enumerate(processes) if p.poll()]
    finally:
        end(processes)
    if dead:
        print(obituary(dead, argv, arguments), file=sys.stderr, flush=True)
        return 1
    return compare(folder, arguments.processes)


def end(processes):
    """Ends what still runs. SIGTERM alone may not do: jax.distributed handles it."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.terminate()
    deadline = time.monotonic() + (GRACE if running else 0)
    while any(p.poll() is None for p in running) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in running:
        process.kill()
        process.wait()


def obituary(dead, argv, arguments):
    """Which processes died first and of what, and how to go on."""
    lines = []
    for number, status in dead:
        if status < 0:
            lines.append(f"Process {number} was killed by {signal.Signals(-status).name}.")
        else:
            log = arguments.out / f"process-{number}.log"
            last = (log.read_text().strip() or "no message").splitlines()[-1]
            lines.append(f"Process {number} failed with exit status {status}: {last} (see {log})")
    lines.append("The others were ended: without it they would wait for ever.")
    steps = checkpoint_steps(arguments.out)
    if steps:
        again = [*(a for a in argv if a != "--resume"), "--resume"]
        command = shlex.join(["python", os.path.relpath(__file__), *again])
        lines.append(
            f"The last checkpoint is of step {steps[-1]}. To go on from there:\n  {command}"
        )
    else:
        lines.append("There is no checkpoint yet: start again.")
    return "\n".join(lines)


def checkpoint_steps(folder):
    """Steps of complete checkpoints: Orbax gives a folder its number when all is written."""
    return sorted(int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdigit())


def is_of_another_program(folder):
    """Whether the record in a folder is of a run that cannot be one of this program."""
    record = run_record.read(folder)
    return bool(record) and "processes" not in record["arguments"]


def compare(folder, count):
    """0 if all processes ended with the same parameters."""
    results = [json.loads((folder / f"result-{n}.json").read_text()) for n in range(count)]
    if len({result["parameters"] for result in results}) > 1:
        print("The processes do NOT hold the same parameters.", file=sys.stderr)
        return 1
    print(f"All {count} processes hold the same parameters, bit for bit.")
    return 0


# One process.


def end_with_launcher():
    """Ends this process when the launcher is gone, however it went."""

    def watch():
        os.read(0, 1)  # returns when the other end of the pipe is closed
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def work(arguments):
    """One of the processes."""
    try:
        import jax
        import optax
        import orbax.checkpoint as ocp
        from jax.sharding import AxisType, NamedSharding
        from jax.sharding import PartitionSpec as P

        import corpus
        import llama
        import lorenza_optax
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"The examples need {error.name!r}: pip install 'lorenza_optax[examples]'"
        ) from None

    if arguments.preset not in llama.PRESETS:
        raise SystemExit(f"--preset {arguments.preset}: choose from {', '.join(llama.PRESETS)}")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_num_cpu_devices", 1)
    number, count = arguments.process_id, arguments.processes
    jax.distributed.initialize(arguments.coordinator, count, number)

    preset = llama.PRESETS[arguments.preset]
    text = corpus.tokenize(*corpus.read_documents(arguments.data), "bytes", 256, preset.seq_len)
    same_text(arguments, run_record.Data("text", text.description, text.fingerprint))
    tokens = own_part(text.train, number, count)
    loss = llama.loss_of(preset.model)
    tx = lorenza_optax.lorenza(
        arguments.lr, preset.rank, arguments.update_proj_gap, rho=arguments.rho, seed=arguments.seed
    )

    mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,))
    replicated, by_rows = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    shapes = llama.abstract(preset.model)[1]
    divided = arguments.layout == "fsdp"
    param_shardings = jax.tree.map(
        lambda leaf: by_rows if divided and leaf.shape[0] % count == 0 else replicated, shapes
    )
    # The optimizer's state lies where its parameters do.
    state_shardings = lorenza_optax.state_shardings(tx, shapes, param_shardings)
    shardings = {"params": param_shardings, "opt_state": state_shardings}

    def initial():
        params = llama.init(preset.model, arguments.seed)
        return {"params": params, "opt_state": tx.init(params)}

    def step(train, batch):
        params, opt_state = train["params"], train["opt_state"]
        updates, opt_state = tx.update(None, opt_state, params, value_fn=loss, batch=batch)
        params = optax.apply_updates(params, updates)
        return {"params": params, "opt_state": opt_state}, optax.tree.get(opt_state, "value")

    step = jax.jit(step, out_shardings=(shardings, replicated), donate_argnums=0)
    # Not asynchronous: the next step overwrites (donates) the arrays that are being saved.
    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    folder = (arguments.out / "checkpoints").absolute()
    with ocp.CheckpointManager(folder, options=options) as manager:
        done = manager.latest_step() or 0
        if done:
            target = jax.tree.map(
                lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
                jax.eval_shape(initial), shardings,
            )  # fmt: skip
            train = manager.restore(done, args=ocp.args.StandardRestore(target))
            report(number, f"goes on after step {done}")
        else:
            train = jax.jit(initial, out_shardings=shardings)()
        while done < arguments.steps:
            mine = corpus.train_batch(
                tokens, arguments.seed, done, arguments.batch_size, preset.seq_len
            )
            batch = jax.make_array_from_process_local_data(by_rows, mine)
            train, value = step(train, batch)
            done += 1
            if number == 0:
                report(number, f"step {done} loss {float(value):.4f}")
            if done % arguments.checkpoint_every == 0 or done == arguments.steps:
                manager.save(done, args=ocp.args.StandardSave(train))
    whole = jax.jit(lambda params: params, out_shardings=replicated)(train["params"])
    digest = fingerprint([leaf.addressable_data(0) for leaf in jax.tree.leaves(whole)])
    report(number, f"parameters {digest}")
    result = {"step": done, "parameters": digest}
    (arguments.out / f"result-{number}.json").write_text(json.dumps(result) + "\n")
    jax.distributed.shutdown()


def same_text(arguments, text):
    """The first process records the text, which must be the same after every checkpoint."""
    # There is no checkpoint before all processes have passed here: none reads what is written.
    if checkpoint_steps(arguments.out):
        run_record.check_data(arguments.out, text)
    elif arguments.process_id == 0:
        run_record.write(arguments, **{text.kind: text.fingerprint})


def own_part(tokens, number, count):
    """The part of the text that this process trains on, and no other."""
    size = len(tokens) // count
    return tokens[number * size : (number + 1) * size]


def fingerprint(arrays):
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(numpy.asarray(array).tobytes())
    return digest.hexdigest()[:16]


def report(number, text):
    print(f"process {number}: {text}", flush=True)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    if arguments.process_id is None:
        return launch(argv, arguments)
    end_with_launcher()
    return work(arguments)


if __name__ == "__main__":
    sys.exit(main())
