//! Ranks as processes: the bits of one, whoever starts them; killed, stopped and at odds.

use std::process::ChildStderr;

use fathom_trace::shared;

use super::*;

/// Four ranks in two pipelines of two.
const FOUR: [&str; 6] = ["--ranks", "4", "--set", "parallel.dp=2", "--set", "parallel.pp=2"];

impl Bench {
    /// Starts the four ranks by `--processes`, with more flags.
    fn launch(&self, name: &str, more: &[&str]) -> Child {
        let mut command = self.command(name, &FOUR);
        command.arg("--processes").args(more);
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Starts two data parallel ranks by variables alone.
    fn pair(&self, name: &str, variables: &[[&str; 2]; 2], more: [&[&str]; 2]) -> [Output; 2] {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let children = [0, 1].map(|rank| {
            let mut command = self.command(name, &["--set", "parallel.dp=2"]);
            command.args(more[rank]).env("MASTER_ADDR", "localhost");
            command.env("MASTER_PORT", port.to_string());
            for [name, values] in variables {
                command.env(name, values.split(' ').nth(rank).unwrap());
            }
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        });
        children.map(|child| child.wait_with_output().unwrap())
    }
}

/// `mpirun`, which starts four ranks of what follows; none where the test says that it is skipped.
fn mpirun() -> Option<Command> {
    if !cfg!(feature = "mpi") {
        shared::skipped("ranks over MPI: build the tests with --features mpi");
        return None;
    }
    let mut command = Command::new("mpirun");
    if !command.arg("--version").output().is_ok_and(|output| output.status.success()) {
        shared::skipped("ranks over MPI: there is no mpirun");
        return None;
    }
    let mut command = Command::new("mpirun");
    // Open MPI's: as root, and more ranks than cores, which then are bound to none.
    for name in ["ALLOW_RUN_AS_ROOT", "ALLOW_RUN_AS_ROOT_CONFIRM", "MCA_rmaps_base_oversubscribe"] {
        command.env(format!("OMPI_{name}"), "1");
    }
    command.env("OMPI_MCA_hwloc_base_binding_policy", "none");
    command.args(["-n", "4"]).env("RAYON_NUM_THREADS", "1");
    Some(command)
}

/// The processes that a process has started, in order; none once it has ended.
fn children(id: u32) -> Vec<u32> {
    let parent = |process: &u32| -> Option<u32> {
        let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
        // The name, in parentheses, may hold anything; state and parent follow.
        stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
    };
    let all = fs::read_dir("/proc").unwrap().flatten();
    let all = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let mut own: Vec<u32> = all.filter(|process| parent(process) == Some(id)).collect();
    own.sort_unstable();
    own
}

fn signal(name: &str, id: u32) {
    assert!(Command::new("kill").args([name, &id.to_string()]).status().unwrap().success());
}

/// All that a process that has ended said.
fn said(stderr: &mut Option<ChildStderr>) -> String {
    std::io::read_to_string(stderr.take().unwrap()).unwrap()
}

fn error(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn processes_have_the_bits_logs_and_samples_of_one_process() {
    let bench = Bench::new();
    let held_out = bench.out("held-out.txt");
    fs::write(&held_out, "a line that is held out\n".repeat(20)).unwrap();
    let held_out = held_out.to_str().unwrap();
    let more = ["--validate", held_out, "--set", "data.validation.every=8"];
    bench.run("alone", &more);
    let ended = bench.launch("launched", &more).wait_with_output().unwrap();
    assert!(ended.status.success(), "{}", error(&ended));
    assert_same_parts(&bench, "alone", "launched", &["model", "model-average"]);
    assert_eq!(bench.lines("alone", &["sample", "validation"]).len(), 4 + 5);
    assert_same_lines(&bench, "alone", "launched");
    let threads = [&FOUR[..], &more].concat();
    bench.run("threads", &threads);
    assert_same_lines(&bench, "alone", "threads");
    // And as srun and torchrun would start them.
    for variables in [
        [["SLURM_PROCID", "0 1"], ["SLURM_STEP_NUM_TASKS", "2 2"]],
        [["RANK", "0 1"], ["WORLD_SIZE", "2 2"]],
    ] {
        let name = variables[0][0];
        for ended in bench.pair(name, &variables, [&more, &more]) {
            assert!(ended.status.success(), "{}", error(&ended));
        }
        assert_same_parts(&bench, "alone", name, &["model", "model-average"]);
        assert_same_lines(&bench, "alone", name);
    }
}

/// Tensor parallel ranks as threads, as processes, beside other ranks. How many there are is part
/// of the run, as long as nobody edits its file.
#[test]
fn tensor_parallel_processes_have_the_bits_of_threads() {
    let bench = Bench::new();
    let split = ["--precision", "bf16", "--set", "parallel.tp=2"];
    bench.run("threads", &split);
    for (name, layout) in [("two", &[][..]), ("four", &["--set", "parallel.dp=2"])] {
        bench.run(name, &[&split[..], &["--processes"], layout].concat());
        assert_same_parts(&bench, "threads", name, &["model", "model-average"]);
        assert_same_lines(&bench, "threads", name);
    }
    bench.run("one", &["--precision", "bf16"]);
    let weights = |name: &str| files(&bench.out(name).join("model"));
    assert!(weights("one") != weights("threads"), "partial products are added in another order");
    let message = bench.refused("threads", &["--resume", "--set", "parallel.tp=1"]);
    assert!(message.contains("parallel.tp is 2 there and 1 on the command line"), "{message}");
    let message = bench.refused("none", &["--set", "parallel.tp=2"]);
    assert!(message.contains("parallel.tp: expected a number of ranks"), "{message}");
}

/// Context parallel ranks as processes. Into how many parts sequences fall is part of the run, on
/// how many ranks the parts lie is not.
#[test]
fn context_parallel_processes_have_the_bits_of_one_process() {
    let bench = Bench::new();
    bench.run("alone", &["--set", "context_shards=2"]);
    let context = ["--processes", "--set", "parallel.cp=2", "--set", "parallel.ep=2"];
    for (name, layout) in [("two", &[][..]), ("four", &["--set", "parallel.dp=2"])] {
        bench.run(name, &[&context[..], layout].concat());
        assert_same_parts(&bench, "alone", name, &["model", "model-average"]);
        assert_same_lines(&bench, "alone", name);
    }
    let message = bench.refused("alone", &["--resume", "--set", "context_shards=4"]);
    let both = "context_shards is 2 there and 4 on the command line";
    assert!(message.contains(both), "{message}");
    let message = bench.refused("none", &["--set", "parallel.cp=2"]);
    assert!(message.contains("parallel.ep: expected a multiple of parallel.cp = 2"), "{message}");
}

/// Rows of experts, hidden states, gradients and checkpoints through MPI.
#[test]
fn ranks_over_mpi_have_the_bits_of_one_process() {
    let Some(mpirun) = mpirun() else { return };
    let bench = Bench::new();
    let result = ["--set", "expert_union=2"];
    bench.run("alone", &result);
    let layout = ["parallel.pp=2", "parallel.dp=2", "parallel.ep=2"];
    let layout = layout.iter().flat_map(|set| ["--set", set]).chain(result);
    let ended = bench.before(mpirun, "mpi", &layout.collect::<Vec<_>>()).output().unwrap();
    assert!(ended.status.success(), "{}", error(&ended));
    assert_same_parts(&bench, "alone", "mpi", &["model", "model-average"]);
    assert_same_lines(&bench, "alone", "mpi");
    // And the sums of tensor parallel ranks.
    let Some(mpirun) = self::mpirun() else { return };
    let split = ["--precision", "bf16", "--set", "parallel.tp=2"];
    bench.run("threads", &split);
    let layout = [&split[..], &["--set", "parallel.dp=2"]].concat();
    let ended = bench.before(mpirun, "split", &layout).output().unwrap();
    assert!(ended.status.success(), "{}", error(&ended));
    assert_same_parts(&bench, "threads", "split", &["model", "model-average"]);
    assert_same_lines(&bench, "threads", "split");
}

/// `mpirun` ends all ranks where one is killed; the last checkpoint is whole.
#[test]
fn a_rank_of_mpi_that_is_killed_ends_the_run_which_goes_on_with_the_same_bits() {
    let bench = Bench::new();
    let layout = ["--set", "parallel.pp=2", "--set", "parallel.dp=2"];
    for victim in [0, 3] {
        let Some(mpirun) = mpirun() else { return };
        let before = bench.steps("killed").len();
        let mut command = bench.before(mpirun, "killed", &[&["--resume"], &layout[..]].concat());
        let command = command.stdout(Stdio::null()).stderr(Stdio::piped());
        let mut launcher = command.spawn().unwrap();
        while bench.steps("killed").len() < before + 6 {
            std::thread::sleep(Duration::from_millis(2));
            assert!(launcher.try_wait().unwrap().is_none(), "{}", said(&mut launcher.stderr));
        }
        signal("-KILL", children(launcher.id())[victim]);
        let begin = Instant::now();
        assert!(wait(&mut launcher, begin + Duration::from_secs(10)), "it goes on");
        assert!(!launcher.wait().unwrap().success());
        let told = said(&mut launcher.stderr);
        assert!(told.contains(&format!("process rank {victim} ")), "{told}");
    }
    bench.run("killed", &["--resume"]);
    bench.run("alone", &[]);
    assert_same_parts(&bench, "alone", "killed", &["model", "model-average"]);
}

/// Any rank, at any moment: in the meeting, in a step, in the writing of a checkpoint. The others
/// end within 10 s and name it; what was committed is whole. FATHOM_KILLS asks for more.
#[test]
fn ranks_killed_one_at_a_time_end_the_others_and_the_run_goes_on_with_the_same_bits() {
    let bench = Bench::new();
    bench.run("alone", &[]);
    let begin = Instant::now();
    assert!(bench.launch("left", &[]).wait().unwrap().success());
    let whole = begin.elapsed();
    let kills: u32 = std::env::var("FATHOM_KILLS").map_or(6, |n| n.parse().unwrap());
    let mut random = 0x243F_6A88_85A3_08D3u64;
    let mut killed = 0;
    for i in 0..kills {
        random = random.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
        // The first within the time of the meeting, the others anywhere in what is left of the run.
        let most = if i == 0 { 0.05 } else { 0.6 };
        let after = whole.mul_f64(most * (random >> 40) as f64 / (1u64 << 24) as f64);
        let victim = i as usize % 4;
        let mut launcher = bench.launch("killed", &["--resume"]);
        let ended = wait(&mut launcher, Instant::now() + after);
        let ranks = children(launcher.id());
        if ended || ranks.len() < 4 {
            // It came through before, or was not begun.
            launcher.kill().unwrap();
            launcher.wait().unwrap();
            continue;
        }
        signal("-KILL", ranks[victim]);
        killed += 1;
        let begin = Instant::now();
        assert!(wait(&mut launcher, begin + Duration::from_secs(10)), "kill {i}: it goes on");
        assert_eq!(launcher.wait().unwrap().code(), Some(2));
        let told = said(&mut launcher.stderr);
        assert!(told.contains(&format!("rank {victim} was ended by a signal")), "{told}");
        // Those that had met it tell what they were at.
        if told.contains("its process is gone") {
            assert!(told.contains(&format!("rank {victim} has ended (its process")), "{told}");
            assert!(told.contains("waited for"), "{told}");
        }
        let folder = bench.out("killed/checkpoints");
        for step in bench.checkpoints("killed") {
            let path = fathom_reference::checkpoint::training::path(&folder, step);
            fathom_reference::checkpoint::training::read(&path).unwrap();
        }
    }
    assert!(killed >= kills / 2, "{killed} of {kills} were killed");
    let layout = ["--set", "parallel.pp=1", "--set", "parallel.dp=2"];
    bench.run("killed", &[&["--resume"], &layout[..]].concat());
    assert_same_parts(&bench, "alone", "killed", &["model", "model-average"]);
}

#[test]
fn a_rank_that_is_stopped_is_named_by_the_timeout() {
    let bench = Bench::new();
    let mut launcher = bench.launch("stopped", &["--set", "parallel.timeout_seconds=8"]);
    while bench.steps("stopped").len() < 4 {
        std::thread::sleep(Duration::from_millis(2));
        assert!(launcher.try_wait().unwrap().is_none(), "{}", said(&mut launcher.stderr));
    }
    let stopped = children(launcher.id())[1];
    signal("-STOP", stopped);
    let begin = Instant::now();
    assert!(wait(&mut launcher, begin + Duration::from_secs(40)), "it goes on");
    assert_eq!(launcher.wait().unwrap().code(), Some(2));
    let told = said(&mut launcher.stderr);
    assert!(told.contains("waited 8 s for"), "{told}");
    assert!(told.contains("rank 1 waits for nobody and does not answer"), "{told}");
    assert!(told.contains("rank 1 does not answer"), "{told}");
    assert!(told.contains("rank 1 did not end after another had failed; it was killed"), "{told}");
    bench.run("stopped", &[&FOUR[..], &["--processes", "--resume"]].concat());
    bench.run("alone", &[]);
    assert_same_parts(&bench, "alone", "stopped", &["model", "model-average"]);
}

#[test]
fn an_interrupted_launcher_leaves_a_checkpoint() {
    let bench = Bench::new();
    let mut launcher = bench.launch("stopped", &[]);
    while bench.steps("stopped").len() < 6 {
        std::thread::sleep(Duration::from_millis(2));
        assert!(launcher.try_wait().unwrap().is_none(), "{}", said(&mut launcher.stderr));
    }
    // To the launcher alone, as a batch system may do it.
    signal("-TERM", launcher.id());
    assert!(launcher.wait().unwrap().success(), "{}", said(&mut launcher.stderr));
    let newest = *bench.checkpoints("stopped").last().unwrap();
    assert!((6..40).contains(&newest), "{newest}");
    bench.run("stopped", &["--resume", "--set", "parallel.pp=1", "--set", "parallel.dp=1"]);
    bench.run("alone", &[]);
    assert_same_parts(&bench, "alone", "stopped", &["model", "model-average"]);
}

#[test]
fn ranks_at_odds_are_refused_with_both_sides() {
    let bench = Bench::new();
    let variables = [["RANK", "0 1"], ["WORLD_SIZE", "2 2"]];
    let ends = bench.pair("seeds", &variables, [&["--seed", "1"], &["--seed", "2"]]);
    let told = ends.iter().map(error).collect::<String>();
    assert!(ends.iter().all(|end| end.status.code() == Some(2)), "{told}");
    assert!(told.contains("'seed = 1'") && told.contains("'seed = 2'"), "{told}");
    assert!(!bench.out("seeds").exists(), "nothing was begun");
    // Another text on the second machine, say.
    let other = bench.out("other.txt");
    fs::write(&other, "another text ".repeat(400)).unwrap();
    let data = ["--data", other.to_str().unwrap()];
    let ends = bench.pair("data", &variables, [&[], &data]);
    let told = ends.iter().map(error).collect::<String>();
    assert!(told.contains("ranks disagree"), "{told}");
    let ends = bench.pair("worlds", &[["RANK", "0 1"], ["WORLD_SIZE", "3 3"]], [&[], &[]]);
    assert!(error(&ends[0]).contains("expected 3 ranks, those of the environment"));
    // Two that both are rank 0: one has the port, and waits for the rank that does not come.
    let soon = ["--set", "parallel.timeout_seconds=5"];
    let ends = bench.pair("ranks", &[["RANK", "0 0"], ["WORLD_SIZE", "2 2"]], [&soon, &soon]);
    let told = ends.iter().map(error).collect::<String>();
    assert!(told.contains("name a free MASTER_PORT"), "{told}");
    assert!(told.contains("waited in vain for rank 1"), "{told}");
}
