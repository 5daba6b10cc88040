//! Which rank a process is, as those who start processes tell it: torchrun, `mpirun`, Slurm's
//! `srun`, [`launch`](super::launch), or whoever sets the same variables.

use std::fmt;

/// Port of the meeting where nobody names one: torchrun's.
const PORT: u16 = 29_500;

/// A process among the ranks of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Environment {
    /// Who started it, in words.
    pub starter: String,
    /// Its rank, from 0.
    pub rank: usize,
    /// How many ranks there are.
    pub world: usize,
    /// Its place among those of its machine, from 0.
    pub local_rank: usize,
    /// How many ranks its machine has, where that is told.
    pub local_world: Option<usize>,
    /// Host and port where ranks meet, which the first one serves; no host where none is named and
    /// ranks are on several machines.
    pub meeting: (Option<String>, u16),
    /// Whether `mpirun` has started it, so that MPI can carry its messages.
    pub by_mpirun: bool,
    /// What tells this run's processes from another's that meet at the same place.
    pub run: String,
}

/// Why the environment tells no rank.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{variable}: expected {expected}, found {found}")]
pub struct EnvironmentError {
    /// Name of the environment's variable.
    pub variable: String,
    /// What it has to be.
    pub expected: String,
    /// What it is.
    pub found: String,
}

/// The variables of one way of starting processes.
struct Starter {
    name: &'static str,
    rank: &'static str,
    world: &'static str,
    local_rank: &'static str,
    local_world: &'static str,
    run: &'static str,
    mpi: bool,
}

/// The first whose variables `rank` and `world` are both there counts. Slurm's are those that
/// `srun` sets for a task: the script of a job that runs outside of any step has only some of them.
const STARTERS: [Starter; 4] = [
    Starter {
        name: "torchrun or its like",
        rank: "RANK",
        world: "WORLD_SIZE",
        local_rank: "LOCAL_RANK",
        local_world: "LOCAL_WORLD_SIZE",
        run: "TORCHELASTIC_RUN_ID",
        mpi: false,
    },
    Starter {
        name: "Open MPI's mpirun",
        rank: "OMPI_COMM_WORLD_RANK",
        world: "OMPI_COMM_WORLD_SIZE",
        local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
        local_world: "OMPI_COMM_WORLD_LOCAL_SIZE",
        run: "PMIX_NAMESPACE",
        mpi: true,
    },
    Starter {
        name: "MPICH's mpirun",
        rank: "PMI_RANK",
        world: "PMI_SIZE",
        local_rank: "MPI_LOCALRANKID",
        local_world: "MPI_LOCALNRANKS",
        run: "PMI_JOBID",
        mpi: true,
    },
    Starter {
        name: "Slurm's srun",
        rank: "SLURM_PROCID",
        world: "SLURM_STEP_NUM_TASKS",
        local_rank: "SLURM_LOCALID",
        local_world: "SLURM_NTASKS_PER_NODE",
        run: "SLURM_JOB_ID",
        mpi: false,
    },
];

impl Environment {
    /// What the process's environment says; none where it says that there is no other rank, or
    /// nothing.
    ///
    /// # Errors
    /// [`EnvironmentError`] naming the variable.
    pub fn read() -> Result<Option<Environment>, EnvironmentError> {
        Environment::of(&|name| std::env::var(name).ok())
    }

    /// The same of any environment.
    ///
    /// # Errors
    /// [`EnvironmentError`].
    pub fn of(
        variable: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Option<Environment>, EnvironmentError> {
        let present = |s: &&Starter| variable(s.rank).is_some() && variable(s.world).is_some();
        let Some(starter) = STARTERS.iter().find(present) else { return Ok(None) };
        let number = |name: &str| variable(name).map(|found| whole(name, &found)).transpose();
        let world = number(starter.world)?.unwrap_or(1);
        let rank = number(starter.rank)?.unwrap_or(0);
        if rank >= world {
            return Err(EnvironmentError {
                variable: starter.rank.to_owned(),
                expected: format!("below {} = {world}", starter.world),
                found: rank.to_string(),
            });
        }
        if world == 1 {
            return Ok(None);
        }
        let local_world = number(starter.local_world)?;
        Ok(Some(Environment {
            starter: starter.name.to_owned(),
            rank,
            world,
            local_rank: number(starter.local_rank)?.unwrap_or(rank),
            local_world,
            meeting: meeting(variable, local_world == Some(world))?,
            by_mpirun: starter.mpi,
            run: variable(starter.run).unwrap_or_default(),
        }))
    }

    /// Whether all ranks are known to be on one machine.
    pub fn on_one_machine(&self) -> bool {
        self.local_world == Some(self.world)
    }

    /// Threads for this rank's computation: `RAYON_NUM_THREADS`, else the CPUs that Slurm gives a
    /// task, else this rank's share of the machine's.
    pub fn threads(&self) -> usize {
        let given = |name| std::env::var(name).ok()?.parse().ok().filter(|&n: &usize| n > 0);
        let share = || {
            let all = std::thread::available_parallelism().map_or(1, usize::from);
            (all / self.local_world.unwrap_or(1)).max(1)
        };
        given("RAYON_NUM_THREADS").or_else(|| given("SLURM_CPUS_PER_TASK")).unwrap_or_else(share)
    }
}

impl fmt::Display for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Environment { starter, rank, world, .. } = self;
        write!(f, "rank {rank} of {world}, started by {starter}")
    }
}

fn whole(name: &str, found: &str) -> Result<usize, EnvironmentError> {
    // Slurm writes `4(x2)` where several machines have as many tasks.
    let digits = found.split('(').next().unwrap_or(found);
    digits.trim().parse().map_err(|_| EnvironmentError {
        variable: name.to_owned(),
        expected: "a whole number".to_owned(),
        found: format!("'{found}'"),
    })
}

/// `MASTER_ADDR` and `MASTER_PORT`; else the first machine of Slurm's step, or this machine where
/// all ranks are here.
fn meeting(
    variable: &dyn Fn(&str) -> Option<String>,
    one_machine: bool,
) -> Result<(Option<String>, u16), EnvironmentError> {
    let port = match variable("MASTER_PORT") {
        None => PORT,
        Some(found) => found.trim().parse().map_err(|_| EnvironmentError {
            variable: "MASTER_PORT".to_owned(),
            expected: "a port, 0 to 65535".to_owned(),
            found: format!("'{found}'"),
        })?,
    };
    let of_slurm = || variable("SLURM_STEP_NODELIST").map(|list| first_host(&list));
    let here = || one_machine.then(|| "127.0.0.1".to_owned());
    Ok((variable("MASTER_ADDR").or_else(of_slurm).or_else(here), port))
}

/// The first machine of a Slurm list: `a` of `a,b`, `n01` of `n[01-03,7],m2`.
fn first_host(list: &str) -> String {
    let Some((name, rest)) = list.split_once('[').filter(|(name, _)| !name.contains(',')) else {
        return list.split(',').next().unwrap_or(list).to_owned();
    };
    let first: String = rest.chars().take_while(char::is_ascii_digit).collect();
    let after = rest.split_once(']').map_or("", |(_, after)| after);
    let suffix: String = after.chars().take_while(|c| *c != ',').collect();
    format!("{name}{first}{suffix}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> Result<Option<Environment>, String> {
        let value = |name: &str| {
            let found = variables.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        Environment::of(&value).map_err(|e| e.to_string())
    }

    #[test]
    fn every_starter_is_understood() {
        let torchrun = of(&[
            ("RANK", "5"),
            ("WORLD_SIZE", "8"),
            ("LOCAL_RANK", "1"),
            ("LOCAL_WORLD_SIZE", "4"),
            ("MASTER_ADDR", "node0"),
            ("MASTER_PORT", "1234"),
        ]);
        let torchrun = torchrun.unwrap().unwrap();
        assert_eq!((torchrun.rank, torchrun.world, torchrun.local_rank), (5, 8, 1));
        assert_eq!(torchrun.meeting, (Some("node0".to_owned()), 1234));
        assert!(!torchrun.on_one_machine());
        let mpi = of(&[
            ("OMPI_COMM_WORLD_RANK", "2"),
            ("OMPI_COMM_WORLD_SIZE", "4"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "4"),
        ]);
        let mpi = mpi.unwrap().unwrap();
        assert!(mpi.by_mpirun && !torchrun.by_mpirun);
        assert_eq!((mpi.rank, mpi.meeting), (2, (Some("127.0.0.1".to_owned()), PORT)));
        let slurm = [
            ("SLURM_PROCID", "9"),
            ("SLURM_STEP_NUM_TASKS", "16"),
            ("SLURM_STEP_NODELIST", "gpu[07-09,12],cpu1"),
            ("SLURM_NTASKS_PER_NODE", "8(x2)"),
        ];
        let found = of(&slurm).unwrap().unwrap();
        assert_eq!((found.rank, found.local_world), (9, Some(8)));
        assert_eq!(found.meeting.0.as_deref(), Some("gpu07"));
        // A job's script, outside of a step, is one process.
        assert_eq!(of(&[slurm[0], ("SLURM_NTASKS", "16")]), Ok(None));
        assert_eq!(of(&[("RANK", "0"), ("WORLD_SIZE", "1")]), Ok(None));
        assert_eq!(of(&[]), Ok(None));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let refused = |variables: &[(&str, &str)], words: &str| {
            let error = of(variables).unwrap_err();
            assert!(error.contains(words), "{error}");
        };
        refused(&[("RANK", "4"), ("WORLD_SIZE", "4")], "RANK: expected below WORLD_SIZE = 4");
        refused(&[("RANK", "x"), ("WORLD_SIZE", "4")], "RANK: expected a whole number, found 'x'");
        let no_address = of(&[("RANK", "0"), ("WORLD_SIZE", "4")]).unwrap().unwrap();
        assert_eq!(no_address.meeting, (None, PORT));
        let port = [("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_PORT", "99999")];
        refused(&port, "MASTER_PORT: expected a port");
        assert_eq!(first_host("a1,b[2-3]"), "a1");
        assert_eq!(first_host("n[1,2]-ib"), "n1-ib");
    }
}
