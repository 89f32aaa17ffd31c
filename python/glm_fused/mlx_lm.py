"""mlx-lm's own command line with this package's models: ``python -m glm_fused.mlx_lm server …``."""

from mlx_lm import cli

from .registration import register


def main() -> None:
    register()
    cli.main()


if __name__ == "__main__":
    main()
