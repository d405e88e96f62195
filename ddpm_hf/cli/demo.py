"""`ddpm-hf demo`: open a page in the browser that samples from a pipeline."""

from collections.abc import Sequence
from pathlib import Path

from ddpm_hf.cli.common import find_device, find_folder, load_pipeline
from ddpm_hf.cli.flags import Parser
from ddpm_hf.config import ConfigError


def demo(arguments: Sequence[str]) -> int:
    """Serve the page until Ctrl-C, and return the exit code."""
    parser = Parser(
        prog="ddpm-hf demo",
        description="Open a page in the browser: sample by seed and class, watch the denoising, morph between seeds,\n"
        'start from an image, inpaint. It needs Gradio: pip install "ddpm_hf[demo]".',
        epilog="example: ddpm-hf demo outputs/digits",
    )
    parser.add_argument("folder", help="folder of a run, a checkpoint or a pipeline, or a Hub repository")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub repository")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 or mps; default: a GPU if there is one")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for the whole network")
    parser.add_argument("--port", type=int, help="port; default: the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="also make a public address, through servers of Gradio")
    options = parser.parse_args(arguments)
    if options.port is not None and not 1 <= options.port <= 65535:
        raise ConfigError(f"--port is {options.port}, but must be between 1 and 65535.")
    try:
        from ddpm_hf.demo import build
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ConfigError('ddpm-hf demo needs Gradio; install it with pip install "ddpm_hf[demo]".') from None

    model = find_folder(options.folder, options.revision)
    pipeline = load_pipeline(options.folder, model, revision=options.revision).to(find_device(options.device))
    if pipeline.num_channels not in (1, 3, 4):
        raise ConfigError(f"{options.folder} makes images of {pipeline.num_channels} channels, which no page can show.")
    title = options.folder if model is None else Path(model.path if model.run is None else model.run).resolve().name
    build(pipeline, title).launch(server_name=options.host, server_port=options.port, share=options.share)
    return 0
