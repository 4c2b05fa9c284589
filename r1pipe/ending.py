"""The end of every stage: measure, then write the record."""


def conclude(run, engine, chat, source, checkpoint, steps):
    run.finish(checkpoint, chat, {"pass_at_1": None}, [], source.hash, steps)


def short_evaluation(run, engine, chat, source):
    return {}
