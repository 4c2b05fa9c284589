"""Labels: the teacher answers the data's prompts (R1 section 2.4)."""

from r1pipe.train.extract.work import ANSWERS, Found, Work


def label(work: Work) -> Found:
    """Its answers that pass the filters."""
    prompts = work.data_prompts()
    rows, funnel, _ = work.kept(prompts, work.teacher.generate(ANSWERS, prompts, work.answers()))
    return Found(rows, funnel)
