"""A study of stand-in trials in a process of its own: run_stand_in.py FOLDER TRIALS SEGMENT [ADDRESS COUNT INDEX]"""

import sys

import jax

if __name__ == "__main__":
    folder, trials, segment, *joined = sys.argv[1:]
    jax.config.update("jax_enable_x64", True)
    if joined:
        address, count, index = joined
        jax.distributed.initialize(address, int(count), int(index))

    import stand_in  # makes a key: processes must be joined before

    from gradflow import dispatch, engine, watch
    from gradflow.study import run_study

    stand_in.install()
    engine.SEGMENT, watch._CHECKPOINT, dispatch._POLL = int(segment), 0.0, 0.001
    dataset = run_study(stand_in.FAKE, key=stand_in.KEY, trials=int(trials), path=folder, batch=4)
    print(dataset.sizes["trial"])
