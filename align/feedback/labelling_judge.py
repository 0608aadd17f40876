"""The judge of a stage that labels: opened, and shown to be better than chance before it labels anything."""

from align.constitution.constitution import Constitution
from align.engines.engine import Engine
from align.engines.provenance import Provenance, label_provenance, pin_judge
from align.feedback.judge import Judge, open_judge
from align.feedback.probes import ProbeReport, examine_judge, require_better_than_chance
from align.run.reproducibility import derive_seed
from align.run.stage import Context


def open_labelling_judge(
    context: Context, constitution: Constitution, engine: Engine | None = None
) -> tuple[Judge, ProbeReport]:
    """The recipe's judge, and its report on the probes. The stage's settings have `principle`: 'all' or 'draw'.

    Args:
        engine: the judge's engine, if it is open already.

    Raises:
        InputError: another engine answers than when the stage began, or it scores choices in another way.
        JudgeAtChance: the probes do not show the judge to be better than chance, and the recipe does not allow that.
    """
    seed = derive_seed(context.seed, context.stage)
    judge = open_judge(
        context.shared["judge"],
        context.shared["model"],
        constitution,
        draw_seed=seed if context.settings.principle == "draw" else None,
        seed=seed,
        engine=engine,
    )
    pin_judge(judge.engine, context.output)
    report = examine_judge(judge, context.output / "probes.journal")
    require_better_than_chance(judge, report)
    return judge, report


def labels_of(context: Context, judge: Judge, report: ProbeReport) -> Provenance:
    """The provenance of the judge's labels."""
    how = {"principle": context.settings.principle, "scored_by": report.scored_by}
    return label_provenance(context, judge.engine, judge.settings, judge.constitution, **how)
