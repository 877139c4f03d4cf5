//! Images of an OCI layout: what their config says is done, and hostile ones are refused by name.
#![allow(clippy::unwrap_used, reason = "helpers of tests: a panic is the failure")]

use std::fs;
use std::path::Path;

use serde_json::json;
use towline_end_to_end::cluster::{BOOT, SHORT};
use towline_end_to_end::oci::{File, layer, layout};
use towline_end_to_end::{Cluster, skipped};

#[test]
fn an_imported_image_is_what_its_config_says() {
    let Ok(busybox) = fs::read("/bin/busybox") else {
        skipped!("/bin/busybox (busybox-static) is not installed: make test installs it");
    };
    let cluster = match Cluster::up() {
        Ok(cluster) => cluster,
        Err(why) => skipped!("{why}"),
    };
    let lower = layer(&[
        File { path: "bin/busybox", mode: 0o755, content: &busybox },
        File { path: "bin/sh", mode: 0o755, content: &busybox },
        File { path: "bin/ls", mode: 0o755, content: &busybox },
        File { path: "bin/cat", mode: 0o755, content: &busybox },
        File { path: "bin/pwd", mode: 0o755, content: &busybox },
        File { path: "bin/id", mode: 0o755, content: &busybox },
        File {
            path: "etc/passwd",
            mode: 0o644,
            content: b"root:x:0:0::/root:/bin/sh\napp:x:1234:1234::/srv:/bin/sh\n",
        },
        File { path: "etc/group", mode: 0o644, content: b"root:x:0:\napp:x:1234:\n" },
        File { path: "srv/kept", mode: 0o644, content: b"kept" },
        File { path: "srv/deleted", mode: 0o644, content: b"deleted" },
        File { path: "opaque/under", mode: 0o644, content: b"under" },
    ]);
    let upper = layer(&[
        File { path: "srv/.wh.deleted", mode: 0o644, content: b"" },
        File { path: "opaque/.wh..wh..opq", mode: 0o644, content: b"" },
        File { path: "opaque/over", mode: 0o644, content: b"over" },
    ]);
    let config = json!({
        "Env": ["PATH=/bin", "GREETING=hello"], "User": "app", "WorkingDir": "/srv",
        "Entrypoint": ["/bin/sh", "-c"], "Cmd": ["echo $GREETING; pwd; id -un; ls /srv /opaque"],
    });
    let folder = cluster.root().join("layout");
    layout(&folder, &[lower, upper], &config);
    import(&cluster, &folder, "app:1").ok();
    let shown =
        cluster.tow(["run", "--rm", "--no-sync", "--image", "app:1"]).finish(BOOT).ok().out();
    assert_eq!(shown, "hello\n/srv\napp\n/opaque:\nover\n\n/srv:\nkept");
    hostile(&cluster);
}

fn import(cluster: &Cluster, path: &Path, name: &str) -> towline_end_to_end::Finished {
    cluster.tow(["image", "import", path.to_str().unwrap(), name]).finish(SHORT)
}

fn hostile(cluster: &Cluster) {
    let escaping = {
        let mut header = tar::Header::new_ustar();
        header.set_size(4);
        header.set_mode(0o644);
        header.as_mut_bytes()[..10].copy_from_slice(b"../escaped");
        header.set_cksum();
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend_from_slice(b"evil");
        bytes.resize(512 * 4, 0);
        bytes
    };
    let folder = cluster.root().join("escaping");
    layout(&folder, &[escaping], &json!({}));
    let refused = import(cluster, &folder, "evil:1").expect(1);
    assert!(refused.err().contains(".."), "{}", refused.err());

    let folder = cluster.root().join("wrong");
    layout(&folder, &[layer(&[File { path: "a", mode: 0o644, content: b"a" }])], &json!({}));
    let blobs = folder.join("blobs/sha256");
    for entry in fs::read_dir(&blobs).unwrap().flatten() {
        let mut bytes = fs::read(entry.path()).unwrap();
        if bytes.starts_with(b"a\0") {
            bytes[600] ^= 1;
            fs::write(entry.path(), bytes).unwrap();
        }
    }
    let refused = import(cluster, &folder, "wrong:1").expect(1);
    assert!(refused.err().contains("digest"), "{}", refused.err());
    assert!(cluster.json(["image", "ls", "--json"]).len() == 1, "only the good one is listed");
}
