//! How many threads this process may have: by the limit of its user (RLIMIT_NPROC of getrlimit(2)), of its cgroup and
//! those around it (pids.max, cgroups(7)), and of the kernel.

use std::path::{Component, Path, PathBuf};

use rustix::process::{Resource, getrlimit};

/// How many more than there are now; `None`: there is no limit. One of a cgroup that is not seen from the namespace of
/// this process is not known here.
pub(crate) fn left() -> Option<u64> {
    left_by(|path| std::fs::read_to_string(path).ok(), getrlimit(Resource::Nproc).current)
}

/// By what the files of the system say, and the limit of the user: who else of it has how many is not asked for.
fn left_by(read: impl Fn(&Path) -> Option<String>, user: Option<u64>) -> Option<u64> {
    let number = |path: &Path| read(path)?.trim().parse::<u64>().ok();
    let kernel =
        ["/proc/sys/kernel/threads-max", "/proc/sys/kernel/pid_max"].map(|path| number(path.as_ref()));
    let all = read("/proc/loadavg".as_ref()).and_then(|text| all_threads(&text)).unwrap_or(0);
    let kernel = kernel.into_iter().flatten().map(|limit| limit.saturating_sub(all)).min();
    let [cgroups, mounts] =
        ["/proc/self/cgroup", "/proc/self/mountinfo"].map(|path| read(path.as_ref()).unwrap_or_default());
    let groups = directories(&cgroups, &mounts).into_iter().filter_map(|directory| {
        let limit = number(&directory.join("pids.max"))?;
        Some(limit.saturating_sub(number(&directory.join("pids.current")).unwrap_or(0)))
    });
    groups.chain(kernel).chain(user).min()
}

/// Of all processes of the system, by `/proc/loadavg` (proc_loadavg(5)): `0.20 0.18 0.12 1/80 11206`.
fn all_threads(loadavg: &str) -> Option<u64> {
    loadavg.split_whitespace().nth(3)?.split_once('/')?.1.parse().ok()
}

/// Where the limits of this process's cgroup and those around it are, by its `cgroup` and `mountinfo` (proc(5)): in a
/// hierarchy with the controller `pids`, or in the one of version 2.
fn directories(cgroups: &str, mounts: &str) -> Vec<PathBuf> {
    let groups = cgroups.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        let of_pids = controllers.split(',').any(|controller| controller == "pids");
        (controllers.is_empty() || of_pids).then_some((!of_pids, Path::new(path)))
    });
    let mounts: Vec<_> = mounts.lines().filter_map(mount).collect();
    let mut directories = Vec::new();
    for (version_2, path) in groups {
        for (_, root, at) in mounts.iter().filter(|(of_2, ..)| *of_2 == version_2) {
            // What is outside of the process's namespace is not mounted.
            let within = path.strip_prefix(root).unwrap_or(Path::new(""));
            let seen = within.components().all(|part| matches!(part, Component::Normal(_)));
            let within = within.components().filter(|_| seen);
            let own: PathBuf = at.components().chain(within).collect();
            let around = own.ancestors().take_while(|directory| directory.starts_with(at));
            directories.extend(around.map(Path::to_path_buf));
        }
    }
    directories
}

/// Whether a mount is of version 2, which of its directories is mounted, and where; `None` where it has no limits of
/// threads: `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`.
fn mount(line: &str) -> Option<(bool, &Path, &Path)> {
    let (place, kind) = line.split_once(" - ")?;
    let mut place = place.split(' ').skip(3);
    let (root, at) = (place.next()?, place.next()?);
    let mut kind = kind.split(' ');
    let (system, options) = (kind.next()?, kind.nth(1).unwrap_or_default());
    let of_pids = system == "cgroup" && options.split(',').any(|option| option == "pids");
    (system == "cgroup2" || of_pids).then_some((!of_pids, Path::new(root), Path::new(at)))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const SERVICE: &str = "/system.slice/servicekeel-router.service";
    const VERSION_2: &str =
        "25 20 0:22 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n";
    const VERSION_1: &str = "\
30 20 0:26 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
31 20 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
32 20 0:28 /docker/7f /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
";

    fn left(files: &[(&str, &str)], user: Option<u64>) -> Option<u64> {
        let files: BTreeMap<_, _> = files.iter().copied().collect();
        left_by(|path| files.get(path.to_str()?).map(|text| (*text).to_owned()), user)
    }

    #[test]
    fn the_least_of_all_limits_counts() {
        let group = format!("0::{SERVICE}\n");
        let own = format!("/sys/fs/cgroup{SERVICE}/pids.max");
        let current = format!("/sys/fs/cgroup{SERVICE}/pids.current");
        let slice = "/sys/fs/cgroup/system.slice/pids.max";
        let mut files = vec![
            ("/proc/self/cgroup", group.as_str()),
            ("/proc/self/mountinfo", VERSION_2),
            ("/proc/sys/kernel/threads-max", "126000\n"),
            ("/proc/sys/kernel/pid_max", "32768\n"),
            ("/proc/loadavg", "0.20 0.18 0.12 1/768 11206\n"),
        ];
        assert_eq!(left(&[], None), None);
        assert_eq!(left(&[], Some(7)), Some(7));
        assert_eq!(left(&files, None), Some(32_000));
        files.extend([(own.as_str(), "4915\n"), (current.as_str(), "15\n"), (slice, "max\n")]);
        assert_eq!(left(&files, None), Some(4900));
        assert_eq!(left(&files, Some(4000)), Some(4000));
        // The limit of a group around it is its own, too.
        files.pop();
        files.push((slice, "1000\n"));
        assert_eq!(left(&files, Some(4000)), Some(1000));
        files.push(("/sys/fs/cgroup/system.slice/pids.current", "1001\n"));
        assert_eq!(left(&files, Some(4000)), Some(0));
    }

    #[test]
    fn a_cgroup_is_found_from_within_its_namespace_and_from_outside() {
        let all = |cgroups, mounts| -> Vec<String> {
            let directories = directories(cgroups, mounts);
            directories.iter().map(|directory| directory.display().to_string()).collect()
        };
        assert_eq!(all("0::/\n", VERSION_2), ["/sys/fs/cgroup"]);
        assert_eq!(all("0::/../other\n", VERSION_2), ["/sys/fs/cgroup"]);
        assert_eq!(
            all("0::/a/b:c\n", VERSION_2),
            ["/sys/fs/cgroup/a/b:c", "/sys/fs/cgroup/a", "/sys/fs/cgroup"]
        );
        let version_1 = "8:pids:/docker/7f/inner\n3:memory:/docker/7f\n0::/\n";
        assert_eq!(
            all(version_1, VERSION_1),
            ["/sys/fs/cgroup/pids/inner", "/sys/fs/cgroup/pids", "/sys/fs/cgroup/unified"]
        );
        for nonsense in ["", "x", "::", "0", "1:pids", "- - -", "0:: \n1 2 3 - cgroup2"] {
            assert_eq!(all(nonsense, nonsense), [] as [&str; 0], "{nonsense}");
        }
    }

    #[test]
    fn this_process_has_room() {
        assert!(super::left().is_none_or(|left| left > 0));
    }
}
