"""A stage that reads another stage's result, and a constitution if the recipe has one."""

from align.constitution.loading import load_constitution
from align.run import processes
from align.run.stage import Context, Outcome, Stage
from align.settings.blocks import Block


class CapitalsBlock(Block):
    ending: str = ""


class Capitals(Stage):
    name = "capitals"
    help = "write capitals"
    settings = CapitalsBlock
    shares = ("constitution",)
    optional = ("constitution",)
    outputs = ("capitals.txt",)
    uses_processes = False

    def inputs(self, settings: CapitalsBlock) -> tuple[str, ...]:
        return ("letters",)

    def run(self, context: Context) -> Outcome:
        text = (context.inputs["letters"] / "letters.txt").read_text().upper() + context.settings.ending
        if context.shared["constitution"]:
            text += load_constitution(context.shared["constitution"]).title
        (context.output / "capitals.txt").write_text(f"{text} {processes.rank()}")
        return Outcome({"capitals": len(text)})


STAGE = Capitals()
