# SPDX-License-Identifier: Apache-2.0
"""The page itself: what is on it, and what happens when it is used. What a user has on it is in `session.py`."""

import inspect
import socket
from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Any, NamedTuple


try:  # first, since the other imports take seconds
    import gradio as gr
except ImportError as error:
    raise ImportError("The page needs gradio: pip install 'moellava[web]'.") from error

from ..formatting import number_text
from ..inspecting import inspect_checkpoint
from ..loading import load_pretrained_model
from .pictures import doubt, open_picture
from .routing_view import routing_html
from .session import ServedModel, Session, Turn
from .style import CSS, theme


_KEEP_UPLOADS_S = 24 * 3600
_LARGEST_UPLOAD = "50mb"
# Any kind of file that browsers have a name for: `_check` then says in plain words what is no picture. With pictures
# alone, the gallery itself would say no more than that an error occurred.
_ACCEPTED = ["image", "text", "audio", "video", "application/*", "file"]


def build_page(checkpoints: Sequence[str], **load_options) -> gr.Blocks:
    """Loads checkpoints and builds the page to try them on.

    Args:
        checkpoints (`Sequence[str]`): Folders or Hub ids. Of several, all get the same questions, side by side.
        load_options: Passed on to `load_pretrained_model`, for all of them: `device`, `dtype`, `load_4bit`, ...

    Returns:
        `gradio.Blocks`: The page, as `launch` serves it, or to be mounted in an app of your own with
        `gradio.mount_gradio_app`.

    Raises:
        ImportError: gradio is not installed.
        ValueError: No checkpoint is given, or one is not a checkpoint of this package.
    """
    models = _load(checkpoints, load_options)
    with gr.Blocks(
        title="MoELLaVA",
        analytics_enabled=False,
        fill_width=True,
        delete_cache=(3600, _KEEP_UPLOADS_S),
    ) as page:
        _wire(_lay_out(models), models)
    return page.queue(default_concurrency_limit=1, max_size=100)


def launch(
    checkpoints: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
    open_browser: bool = True,
    on_ready: Callable[[str], None] | None = None,
    **load_options,
) -> None:
    """Loads checkpoints and serves the page until it is interrupted (Ctrl-C).

    Nothing is fetched from other machines by the page, and nothing is sent to any, unless `share` is set.

    Args:
        checkpoints (`Sequence[str]`): Folders or Hub ids. Of several, all get the same questions, side by side.
        host (`str`, *optional*, defaults to `"127.0.0.1"`): The address to listen on; `"0.0.0.0"` for all of this
            machine's, so that others in the network reach the page.
        port (`int`, *optional*, defaults to 7860): The port; 0 for any that is free.
        share (`bool`, *optional*, defaults to `False`): Whether to make the page reachable from the internet for a
            week, through a server of Gradio's.
        open_browser (`bool`, *optional*, defaults to `True`): Whether to open the page in a browser here.
        on_ready (callable, *optional*): Gets the page's address when it can be visited; otherwise Gradio prints it.
        load_options: Passed on to `load_pretrained_model`, for all checkpoints.

    Raises:
        ImportError: gradio is not installed.
        OSError: The port is taken.
        ValueError: No checkpoint is given, or one is not a checkpoint of this package.
    """
    port = _free_port(host, port)  # before the models, which take longer
    page = build_page(checkpoints, **load_options)
    _, local_url, share_url = page.launch(
        server_name=host,
        server_port=port,
        share=share,
        inbrowser=open_browser,
        quiet=on_ready is not None,
        prevent_thread_lock=True,
        theme=theme(),
        css=CSS,
        # None of Gradio's own additions: they show the page's functions, or its users to one another.
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        max_file_size=_LARGEST_UPLOAD,
    )
    if on_ready is not None:
        on_ready(share_url or local_url)
    page.block_thread()


def _load(checkpoints: Sequence[str], load_options: dict[str, Any]) -> list[ServedModel]:
    if isinstance(checkpoints, str):
        checkpoints = [checkpoints]
    if not checkpoints:
        raise ValueError("No checkpoint is given; expected one, or several to compare.")
    if load_options.get("model_base") is None:  # else they are adapters, which only loading can tell
        known = inspect.signature(inspect_checkpoint).parameters
        hub_options = {name: value for name, value in load_options.items() if name in known}
        for checkpoint in checkpoints:  # all of them, before the weights of any are read
            inspect_checkpoint(checkpoint, **hub_options)
    return [ServedModel(str(name), load_pretrained_model(name, **load_options)) for name in checkpoints]


def _free_port(host: str, port: int) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError as error:
            raise OSError(
                f"Port {port} of {host} cannot be listened on ({error.strerror}). Give another port, or 0 for any that "
                "is free."
            ) from error
        return trial.getsockname()[1]


def _described(model: ServedModel) -> str:
    config = model.loaded.model.config
    facts = [
        f"{number_text(model.loaded.model.num_parameters())} parameters",
        f"{config.encoder_type} encoder",
        f"{config.projector_config.type} projector",
        f"{config.text_config.model_type} language model",
        f"{config.image_seq_length} tokens per picture",
    ]
    if model.is_sparse:
        facts.append(f"{config.moe_config.num_experts} experts in {len(config.moe_config.layers)} layers")
    return ", ".join(facts)


# What is on the page


class _Widgets(NamedTuple):
    """What of the page is read and written when it is used; `chats` and `notes` have one for every model."""

    pictures: gr.Gallery
    alert: gr.HTML
    max_new_tokens: gr.Slider
    temperature: gr.Slider
    with_routing: gr.Checkbox
    chats: list[gr.Chatbot]
    notes: list[gr.HTML]
    question: gr.Textbox
    ask: gr.Button
    stop: gr.Button
    clear: gr.Button
    layer: gr.Radio
    routings: list[gr.HTML]


def _lay_out(models: list[ServedModel]) -> _Widgets:
    sparse = [model for model in models if model.is_sparse]
    described = "<br>".join(f"<strong>{escape(model.name)}</strong>: {escape(_described(model))}" for model in models)
    gr.HTML(f"<h1>MoELLaVA</h1><p>{described}</p>", elem_id="mv-title")
    for model in models:
        untrained = model.loaded.model.config.untrained_parts
        if untrained:
            text = f"{model.name}: {' and '.join(untrained)} never trained. Answers about images are meaningless."
            gr.HTML(f'<p role="note">{escape(text)}</p>', elem_classes="mv-banner")
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280):
            pictures = gr.Gallery(
                label="Pictures",
                elem_id="mv-gallery",
                file_types=_ACCEPTED,
                sources=["upload", "clipboard"],
                type="filepath",
                interactive=True,
                columns=2,
                height=330,
                object_fit="contain",
                buttons=["fullscreen"],
            )
            alert = gr.HTML(elem_classes="mv-alert", visible=False)
            settings = _settings(with_routing=bool(sparse))
        with gr.Column(scale=3, min_width=320):
            with gr.Row(equal_height=False):
                chats, notes = zip(*(_conversation(model, len(models) == 1) for model in models), strict=True)
            with gr.Row(equal_height=False):
                question = gr.Textbox(
                    label="Question", placeholder="What is shown?", lines=1, max_lines=6, scale=6, autofocus=True
                )
                with gr.Column(scale=1, min_width=110):
                    ask = gr.Button("Ask", variant="primary")
                    stop = gr.Button("Stop", variant="stop", visible=False)
                    clear = gr.Button("Clear")
    layer, routings = _routing(sparse, with_names=len(models) > 1)
    return _Widgets(pictures, alert, *settings, list(chats), list(notes), question, ask, stop, clear, layer, routings)


def _settings(with_routing: bool) -> tuple[gr.Slider, gr.Slider, gr.Checkbox]:
    with gr.Accordion("Settings", open=False):
        return (
            gr.Slider(1, 1024, value=128, step=1, label="Longest answer, in tokens"),
            gr.Slider(0, 2, value=0, step=0.05, label="Temperature", info="0: always the most probable answer"),
            gr.Checkbox(
                True,
                label="Trace the routing",
                info="One more pass over the question and the pictures",
                visible=with_routing,
            ),
        )


def _conversation(model: ServedModel, is_alone: bool) -> tuple[gr.Chatbot, gr.HTML]:
    with gr.Column(min_width=280):
        chat = gr.Chatbot(
            label="Conversation" if is_alone else model.name,
            height=430,
            layout="bubble",
            render_markdown=False,  # as the model wrote it
            buttons=[],
            elem_classes="mv-chat",
            feedback_options=None,
            placeholder="Drop pictures on the left, and ask.",
        )
        note = gr.HTML(elem_classes="mv-note")
    return chat, note


def _routing(sparse: list[ServedModel], with_names: bool) -> tuple[gr.Radio, list[gr.HTML]]:
    """The routing of sparse models, a row for each; invisible where there are none."""
    layers = sorted({layer for model in sparse for layer in model.loaded.model.config.moe_config.layers})
    with gr.Accordion("Routing: which expert takes which patch and which word", visible=bool(sparse)):
        layer = gr.Radio([(str(layer), layer) for layer in layers], value=next(iter(layers), None), label="Layer")
        views = []
        for model in sparse:
            if with_names:
                gr.HTML(f"<strong>{escape(model.name)}</strong>")
            views.append(gr.HTML(routing_html(None, layers[0]), apply_default_css=False, elem_classes="mv-view"))
    return layer, views


# What happens when it is used

# Events that need no model: at once, past the queue. None is offered as an API.
_INSTANT = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
# Events that need the models, which answer one user at a time.
_IN_TURN = {
    "concurrency_id": "models", "concurrency_limit": 1, "show_progress": "hidden", "api_visibility": "private"
}  # fmt: skip


def _wire(widgets: _Widgets, models: list[ServedModel]) -> None:
    """Says what every button does. A user's session is made at their first question, and is theirs alone."""
    state = gr.State(None)
    shown = [*widgets.chats, *widgets.notes]
    buttons = [widgets.ask, widgets.stop]

    def pose(session: Session | None, question: str, pictures: list[tuple[str, Any]] | None) -> list[Any]:
        session = session or Session(models)
        try:
            session.pose(question, [path for path, _ in pictures or []])
        except ValueError as error:
            kept, _ = _check(pictures)
            return [session, question, kept, _alert(str(error)), *_buttons(session), *[gr.skip()] * len(shown)]
        return [session, "", gr.skip(), _alert(""), *_buttons(session), *_view(session)]

    def start_anew(session: Session | None) -> list[Any]:
        if session is not None:
            session.leave()
        session = Session(models)
        return [session, None, _alert(""), *_buttons(session), *_view(session)]

    widgets.pictures.upload(
        _check, widgets.pictures, [widgets.pictures, widgets.alert], trigger_mode="always_last", **_INSTANT
    )
    posed = gr.on(
        [widgets.ask.click, widgets.question.submit],
        pose,
        [state, widgets.question, widgets.pictures],
        [state, widgets.question, widgets.pictures, widgets.alert, *buttons, *shown],
        **_INSTANT,
    )
    answered = posed.then(
        _answer, [state, widgets.max_new_tokens, widgets.temperature, widgets.with_routing], shown, **_IN_TURN
    )
    widgets.stop.click(Session.stop, state, None, **_INSTANT)
    cleared = gr.on(
        [widgets.clear.click, *(chat.clear for chat in widgets.chats)],
        start_anew,
        state,
        [state, widgets.pictures, widgets.alert, *buttons, *shown],
        cancels=[answered],
        **_INSTANT,
    )
    # Once more: a piece of the answer that was on its way may have come after the page was cleared.
    cleared = cleared.then(_view, state, shown, **_INSTANT)
    answered.then(_buttons, state, buttons, **_INSTANT)
    for event in (answered.then, cleared.then, widgets.layer.change):
        event(_routings, [state, widgets.layer], widgets.routings, **_INSTANT)


def _check(pictures: list[tuple[str, Any]] | None) -> tuple[Any, Any]:
    """Takes out of the pictures what is none, and says so; and says of which the range is doubtful."""
    good, faults, doubts = [], [], []
    for path, _ in pictures or []:
        try:
            open_picture(path)
            good.append(path)
            doubts.append(doubt(path))
        except ValueError as error:
            faults.append(str(error))
    return (good if faults else gr.skip()), _alert(" ".join([*faults, *filter(None, doubts)]))


def _answer(session: Session, max_new_tokens: int, temperature: float, with_routing: bool) -> Iterator[list[Any]]:
    for _ in session.answers(int(max_new_tokens), temperature, with_routing):
        if not session.is_left:
            yield _view(session)
    if not session.is_left:
        yield _view(session)


def _view(session: Session) -> list[Any]:
    return [
        *([_message(turn) for turn in conversation.turns] for conversation in session.conversations),
        *(_note_html(conversation.note, conversation.failed) for conversation in session.conversations),
    ]


def _buttons(session: Session) -> list[Any]:
    return [gr.update(visible=not session.is_busy), gr.update(visible=session.is_busy)]


def _routings(session: Session | None, layer: int | None) -> list[Any]:
    if session is None:
        return gr.skip()
    conversations = session.conversations
    return [routing_html(conversation.trace, layer) for conversation in conversations if conversation.model.is_sparse]


def _message(turn: Turn) -> dict[str, Any]:
    # Escaped, or a tag in an answer could name a picture elsewhere, which the browser would fetch.
    text = escape(turn.text, quote=False)
    # Not as files: those get a button that uploads to the Hub, and stay blank in formats that browsers do not know.
    shown = "".join(f'<img src="{address}" alt="{escape(name)}">' for name, address in turn.pictures)
    asked = [gr.HTML(f'<div class="mv-asked">{shown}</div>')] if shown else []
    return {"role": turn.role, "content": [*asked, text]}


def _alert(text: str) -> Any:
    return gr.update(value=f'<p role="alert">{escape(text)}</p>', visible=bool(text))


def _note_html(note: str, failed: bool) -> str:
    kind = 'class="mv-error" role="alert"' if failed else 'role="status"'
    return f"<div {kind}>{escape(note)}</div>"


__all__ = ["build_page", "launch"]
