"""Variables that tell a rank its place (r1pipe.train.engine.discovery): what it starts is no rank."""

from collections.abc import Mapping

MEETING_PORTS = range(20000, 30000)  # where ranks may meet: below those that Linux hands out by itself
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
# torchrun's, DeepSpeed's, those of MPI (with each implementation's own), srun's, and this launch's
PREFIXES = (
    *("GROUP_", "ROLE_", "TORCHELASTIC_", "CROSS_"),
    *("OMPI_COMM_WORLD_", "PMI_", "PMIX_", "MPI_LOCAL", "PALS_"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_STEP_", "R1PIPE_LAUNCH"),
)


def without_place(variables: Mapping[str, str]) -> dict[str, str]:
    """The other variables."""
    return {
        name: value
        for name, value in variables.items()
        if name not in NAMES and not name.startswith(PREFIXES)
    }
