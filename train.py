"""Train a model: `python train.py [scale=...] [method=...] [data=...] [SETTING=VALUE ...]`; see configs/."""

import sys

import hydra
from omegaconf import DictConfig

from unipool_jax.config.compose import compose_config, config_from_omegaconf, register_schema
from unipool_jax.config.schema import Config
from unipool_jax.training.entry import guarded, run


def start(config: Config) -> int:
    """Do what `mode` says."""
    if config.mode == "plan":
        from unipool_jax.planner import command

        return command.run(config)
    return run(config)


@hydra.main(config_path="configs", config_name="config", version_base="1.3")
def main(node: DictConfig) -> None:
    """Run what Hydra composed (`--help`, `--cfg job`, `--multirun`)."""
    code = guarded(lambda: start(config_from_omegaconf(node)))
    if code:
        sys.exit(code)


if __name__ == "__main__":
    register_schema()
    if any(argument.startswith("-") for argument in sys.argv[1:]):
        main()
    else:
        # The same composition, with every problem of the command line reported at once.
        sys.exit(guarded(lambda: start(compose_config(sys.argv[1:]))))
