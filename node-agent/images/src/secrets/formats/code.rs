//! Tokens of those who host, build and publish code.

use super::{Format, token};
use crate::secrets::value;

pub(super) const ALL: &[Format] = &[
    token(
        "github-token",
        "A token of GitHub: personal, OAuth, of an app or a runner.",
        &["ghp_", "gho_", "ghu_", "ghs_", "ghr_"],
        r"gh[pousr]_[A-Za-z0-9]{36,251}\b",
    ),
    token(
        "github-fine-grained-token",
        "A personal access token of GitHub for some repositories.",
        &["github_pat_"],
        r"github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}\b",
    ),
    token(
        "gitlab-token",
        "A token of GitLab: personal, of a deployment, a runner, a job, a feed.",
        &[
            "glpat-",
            "gldt-",
            "glrt-",
            "glrtr-",
            "glcbt-",
            "glptt-",
            "glft-",
            "glsoat-",
            "glimt-",
            "glagent-",
            "gloas-",
            "glffct-",
            "glwt-",
            "GR1348941",
        ],
        r"(?:gl(?:pat|dt|rt|rtr|cbt|ptt|ft|soat|imt|agent|oas|ffct|wt)-(?:[a-z0-9]_)?[A-Za-z0-9_.-]{20,}|GR1348941[A-Za-z0-9_-]{20})",
    ),
    token(
        "atlassian-token",
        "A token of Atlassian or Bitbucket.",
        &["ATATT3", "ATCTT3", "ATBB"],
        r"(?:AT[AC]TT3[A-Za-z0-9_=-]{100,}|ATBB[A-Za-z0-9]{32}\b)",
    ),
    token("npm-token", "A token of the npm registry.", &["npm_"], r"npm_[A-Za-z0-9]{36}\b"),
    token(
        "npmrc-auth",
        "A login of a package registry in npm's settings.",
        &["_authToken", "_auth", "_password"],
        r#":(?:_authToken|_auth|_password)\s*=\s*["']?([!-~&&[^"'${}]]{8,})"#,
    )
    .back(1)
    .anywhere()
    .check(|hit| value::is_chosen(hit.value)),
    token(
        "pypi-token",
        "A token of the Python Package Index.",
        &["pypi-AgE"],
        r"pypi-AgE[A-Za-z0-9_-]{50,}",
    ),
    token("rubygems-key", "An API key of RubyGems.", &["rubygems_"], r"rubygems_[0-9a-f]{48}\b"),
    token("crates-io-token", "A token of crates.io.", &["cio"], r"cio[A-Za-z0-9]{32}\b"),
    token("nuget-key", "An API key of NuGet.", &["oy2"], r"oy2[a-z0-9]{43}\b"),
    token("clojars-token", "A token of Clojars.", &["CLOJARS_"], r"(?i:CLOJARS_)[a-z0-9]{60}\b"),
    token(
        "docker-token",
        "An access token of Docker Hub.",
        &["dckr_pat_", "dckr_oat_"],
        r"dckr_[op]at_[A-Za-z0-9_-]{27,}",
    ),
    token(
        "artifactory-key",
        "An API key or identity token of JFrog.",
        &["AKCp", "cmVmdGtu"],
        r"(?:AKCp[A-Za-z0-9]{69}\b|cmVmdGtu[A-Za-z0-9]{56}\b)",
    ),
    token(
        "circleci-token",
        "A token of CircleCI.",
        &["CCIPAT_", "CCIPRJ_"],
        r"CCI(?:PAT|PRJ)_[A-Za-z0-9]{22}_[0-9a-f]{40}\b",
    ),
    token(
        "buildkite-token",
        "A token of Buildkite.",
        &["bkua_", "bkaj_"],
        r"bk(?:ua|aj)_[A-Za-z0-9]{40,}\b",
    ),
    token(
        "sonarqube-token",
        "A token of SonarQube.",
        &["squ_", "sqp_", "sqa_"],
        r"sq[pua]_[0-9a-f]{40}\b",
    ),
    token("postman-key", "An API key of Postman.", &["PMAK-"], r"PMAK-[0-9a-f]{24}-[0-9a-f]{34}\b"),
    token(
        "sourcegraph-token",
        "A token of Sourcegraph.",
        &["sgp_"],
        r"sgp_(?:[0-9a-f]{16}_|local_)?[0-9a-f]{40}\b",
    ),
];
