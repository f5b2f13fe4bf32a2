"""The page's tab of trainings: one is followed while it runs, live, and one is started after its dry run was shown."""

import html
import json
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.context import Context

from latentfm.cli.plan_tables import duration, size
from latentfm.config import load_config
from latentfm.errors import InputError
from latentfm.training.records.run_page import page
from latentfm.web.html import safe
from latentfm.web.training import endpoints
from latentfm.web.training.runs import ADAPTER, EVERY_WEIGHT, Runs, Wanted, command
from latentfm.words import count, shown

SECONDS = 2.0  # between two looks
QUIET = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}  # of what the page does by itself

# The run page in a frame that stays: it is sent what is new, and draws it in place. Sandboxed, as what it shows comes from files.
FRAME = """
const frame = document.createElement("iframe");
frame.title = "the run";
frame.sandbox = "allow-scripts";
frame.style.cssText = "width:100%;border:0;display:block;height:200px;border-radius:8px";
const send = message => frame.contentWindow?.postMessage(message, "*");
const theme = () => send({ theme: document.body.classList.contains("dark") ? "dark" : "light" });
const pictures = () => props.pictures && send({ pictures: props.pictures });
const run = () => { frame.style.display = props.value ? "block" : "none"; if (props.value) send({ run: props.value }); };
frame.onload = () => { theme(); run(); pictures(); };
addEventListener("message", event => {
  if (event.source === frame.contentWindow && event.data.height > 0) frame.style.height = `${event.data.height}px`;
});
const watched = new MutationObserver(theme);
watched.observe(document.body, { attributes: true, attributeFilter: ["class"] });
watch("value", run);
watch("pictures", pictures);
frame.srcdoc = PAGE;
element.replaceChildren(frame);
"""
STYLE = """
pre { font-size: 12px; line-height: 1.35; max-height: 480px; overflow: auto; margin: 0; white-space: pre; }
p { margin: 0; overflow-wrap: anywhere; }
"""
CONFIGURED = "what the configuration says"


def training_tab(runs: str | Path, data: str | Path | None = None, at_once: int = 1) -> None:
    """Adds to the gr.Tab it is called in what follows the runs in the folder `runs`.

    With `data`, a folder, trainings on pictures below it are started there, stopped and gone on with, `at_once` at a time.
    """
    known, tab = Runs(runs, data, at_once), Context.block
    endpoints.add(known)
    with gr.Row():
        run = choice(choices=labelled(known), label="Run", scale=3, min_width=220, elem_id="training-run")
        with gr.Column(scale=1, min_width=200, visible=known.data is not None), gr.Row():
            stop = gr.Button("Stop", interactive=False, min_width=80, elem_id="training-stop")
            resume = gr.Button("Resume", interactive=False, min_width=80, elem_id="training-resume")
    said = gr.HTML(elem_id="training-said")
    frame = gr.HTML(
        value=None, pictures=None, html_template="<div></div>", elem_id="training-frame", apply_default_css=False,
        js_on_load=FRAME.replace("PAGE", json.dumps(page("a run", "null")).replace("</", "<\\/")),
    )  # fmt: skip
    with gr.Accordion("Log", open=False):
        log = gr.Textbox(show_label=False, lines=10, max_lines=20, interactive=False, container=False, elem_id="training-log")
    seen, timer = gr.State({}), gr.Timer(SECONDS, active=False)
    shown_run = [run, frame, log, stop, resume, seen]

    def follow(name: str | None, seen: dict[str, Any]) -> list[Any]:
        return news(known, name, seen)

    timer.tick(follow, [run, seen], shown_run, **QUIET)
    run.input(follow, [run, seen], shown_run, **QUIET)
    tab.select(lambda: gr.Timer(active=True), None, timer, **QUIET)  # nothing is read for who only draws
    tab.select(follow, [run, seen], shown_run, **QUIET)

    def stop_it(name: str) -> str:
        return told(known.stop, name, done="Asked to stop: it saves after the step under way.")

    def resume_it(name: str) -> str:
        return told(known.resume, name, done="Going on from the newest checkpoint.")

    if known.data is not None:
        for done in (
            stop.click(stop_it, run, said, **QUIET), resume.click(resume_it, run, said, **QUIET), start_form(known, run, said)
        ):  # fmt: skip
            done.then(follow, [run, seen], shown_run, **QUIET)


def news(known: Runs, name: str | None, seen: dict[str, Any]) -> list[Any]:
    """What is new of the run `name` for who has `seen` so much: updates of dropdown, frame, log, both buttons, and what is seen now.

    Without a name the latest run is looked at. What has not changed is not sent.
    """
    choices = labelled(known)
    names = [value for _, value in choices]
    name = name if name in names else next(iter(names), None)
    now: dict[str, Any] = {"choices": choices, "name": name}
    run = gr.skip() if (seen.get("choices"), seen.get("name")) == (choices, name) else gr.Dropdown(choices=choices, value=name)
    if name is None:
        return [run, None, "", gr.Button(interactive=False), gr.Button(interactive=False), now]
    try:
        look = known.look(name)
    except InputError:  # it went a moment ago
        return [gr.skip()] * 5 + [{}]
    now |= look.seen | {"buttons": (look.running, look.resumable)}
    before = seen if seen.get("name") == name else {}
    new = {part for part in now if now[part] != before.get(part)}
    update: dict[str, Any] = ({"value": look.run} if "run" in new else {}) | ({"pictures": look.pictures} if "pictures" in new else {})
    return [
        run,
        gr.update(**update) if update else gr.skip(),
        look.log if "log" in new else gr.skip(),
        gr.Button(interactive=look.running) if "buttons" in new else gr.skip(),
        gr.Button(interactive=look.resumable) if "buttons" in new else gr.skip(),
        now if new else gr.skip(),
    ]


def labelled(known: Runs) -> list[tuple[str, str]]:
    """The runs as a list to pick from: what is shown, and the name."""
    return [(shown(name) + " (running)" * bool(known.running(name)), name) for name in known.names()]


def choice(**options: Any) -> gr.Dropdown:
    """A list to pick a name from that changes while the page is open: the name is checked by what it is given to."""
    made = gr.Dropdown(**options)
    made.preprocess = lambda payload: payload
    return made


def told(act: Callable[[str], None], name: str, done: str) -> str:
    """What to say after `act` was done to the run `name`, or could not be."""
    try:
        act(name)
    except (InputError, OSError) as error:
        return problem(error)
    return note(done)


def note(text: str) -> str:
    """A remark, as HTML."""
    return f'<p class="note" role="status">{safe(text)}</p>'


def problem(error: Exception) -> str:
    """What is wrong, as HTML: each of several things by itself."""
    messages = getattr(error, "messages", [str(error)])
    return "".join(f'<p class="problem" role="alert">{safe(message, 2000)}</p>' for message in messages)


# The start of one


def start_form(known: Runs, run: gr.Dropdown, said: gr.HTML) -> Any:
    """The form that checks and starts a training; returns what follows its start, after which `run` names the new one."""
    configurations = list(known.configurations())
    first = defaults(known, configurations[0])
    with gr.Accordion("Start a training", open=not known.names(), elem_id="training-new"):
        with gr.Row():
            pictures = choice(choices=folders(known), value=None, label="Pictures", info="a folder with captions", min_width=220)
            configuration = choice(choices=configurations, value=configurations[0], label="Configuration", min_width=220)
            name = gr.Textbox(label="Name", info="of the run", max_length=64, min_width=160, elem_id="training-name")
        with gr.Row():
            steps = gr.Number(first[0], label="Steps", precision=0, minimum=1, min_width=120, elem_id="training-steps")
            rate = gr.Number(first[1], label="Learning rate", minimum=0, step=1e-5, min_width=140)
            trains = gr.Radio([CONFIGURED, EVERY_WEIGHT, ADAPTER], value=CONFIGURED, label="What trains", min_width=260)
            rank = gr.Slider(1, 128, first[2], step=1, label="Rank", visible=False, min_width=160)
        with gr.Row():
            check = gr.Button("Check", elem_id="training-check")
            start = gr.Button("Start", variant="primary", interactive=False, elem_id="training-start")
        answer = gr.HTML(css_template=STYLE, elem_id="training-answer")
        line = gr.Textbox(
            label="The command line that does the same", lines=3, max_lines=6, interactive=False, visible=False, buttons=["copy"],
            elem_id="training-command",
        )  # fmt: skip
    checked = gr.State(None)
    inputs = [pictures, configuration, name, steps, rate, trains, rank]

    def wanted(*given: Any) -> Wanted:
        pictures, configuration, name, steps, rate, trains, rank = given
        return Wanted(
            pictures, configuration, (name or "").strip(), steps, rate,
            trains if trains != CONFIGURED else None, rank if trains == ADAPTER else None,
        )  # fmt: skip

    def check_it(*given: Any) -> list[Any]:
        """The dry run's answer for what is in the form, which may be started then."""
        try:
            words, found, text = known.check(asked := wanted(*given))
        except InputError as error:
            return [problem(error), gr.Textbox(visible=False), gr.Button(interactive=False), None]
        answer = f"<p><b>{safe(in_short(found))}</b></p><pre>{html.escape(text)}</pre>"
        return [answer, gr.Textbox(command(words), visible=True), gr.Button(interactive=True), astuple(asked)]

    def start_it(checked: tuple | None, *given: Any) -> list[Any]:
        """Starts what was checked, if that is still what is in the form."""
        asked = wanted(*given)
        try:
            if checked != astuple(asked):
                raise InputError("this was not checked yet, or has changed since; check it first")
            known.start(asked)
        except (InputError, OSError) as error:
            return [gr.skip(), problem(error), gr.skip(), gr.skip()]
        said = note(f"{asked.name} has started; it goes on when this page is closed.")
        return [gr.Dropdown(choices=labelled(known), value=asked.name), said, gr.Button(interactive=False), None]

    def changed() -> list[Any]:
        """Nothing is checked any more."""
        return [gr.Button(interactive=False), None]

    check.click(check_it, inputs, [answer, line, start, checked], api_visibility="private", **endpoints.ONE_AT_A_TIME)
    for each in inputs:
        each.change(changed, None, [start, checked], **QUIET)
    configuration.input(
        lambda name: defaults(known, name), configuration, [steps, rate, rank], **QUIET
    )
    trains.change(lambda what: gr.Slider(visible=what == ADAPTER), trains, rank, **QUIET)
    pictures.focus(lambda: gr.Dropdown(choices=folders(known)), None, pictures, **QUIET)
    return start.click(start_it, [checked, *inputs], [run, said, start, checked], **QUIET)


def in_short(found: dict[str, Any]) -> str:
    """A dry run in one line."""
    steps, batch, memory, time = found["steps"], found["batch"], found["memory"], found["time"]
    epochs = f"{steps['epochs']:,.0f}" if steps["epochs"] >= 100 else f"{steps['epochs']:.3g}"
    room = "" if memory["fits"] else ", which does not fit"
    return (
        f"{count(steps['steps'], 'step')} of {count(batch['pictures a step'], 'picture')}, {epochs} epochs of "
        f"{count(found['data']['pictures'], 'picture')}; {size(memory['total'])} of {size(memory['bytes'])} of memory{room}; "
        f"{size(sum(need['bytes'] for need in found['disk']))} on the disk"
        + (f"; {duration(time['hours'])}" if time.get("hours") else "")
    )


def folders(known: Runs) -> list[tuple[str, str]]:
    """The folders of pictures as a list to pick from: what is shown, and the name."""
    return [(shown(path.name if name == "." else name), name) for name, path in known.pictures().items()]


def defaults(known: Runs, configuration: str) -> tuple[int, float, int]:
    """(steps, learning rate, rank of an adapter) of a configuration."""
    path = known.configurations().get(configuration)
    train = load_config(path, [] if path else ["data.folder=pictures", "output.folder=run"]).train
    return train.steps, train.learning_rate, 16 if train.adapter is None else train.adapter.rank
