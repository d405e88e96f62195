"""The part of a run's schema that says where the pipeline is published."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class HubConfig:
    """Where the pipeline is published, at intervals and when training ends; who you are is no setting.

    Args:
        push_to_hub: Push the pipeline to the Hub in the background, as `ddpm-hf push` does; log in beforehand with
            `hf auth login`, or set HF_TOKEN.
        repo_id: Where to: "user/name", "organisation/name", or "name" for your own; it is made if it does not exist.
        private: Whether a repository that is made is private; one that exists and is public is refused.
        branch: Push to this branch instead of main; it is made if it does not exist.
        fp16: Push half-precision weights too, for `from_pretrained(..., variant="fp16")`.
        license: Identifier of the licence in the card, such as "mit"; null marks it as unknown.
        push_every_steps: Push the averaged weights this often while training; 0 pushes when training ends.
    """

    push_to_hub: bool = False
    repo_id: str | None = None
    private: bool = False
    branch: str | None = None
    fp16: bool = False
    license: str | None = None
    push_every_steps: int = 0
