/// cobuild.dockerfile: the Dockerfile language, from text to typed instructions, with its checks.
///
/// Follows the reference of docker's Dockerfile frontend (docs.docker.com/reference/dockerfile) with here-documents, all
/// stable flags, RUN --mount, and the build checks. Four parts, one after the other:
///
///   :syntax        text -> `file` (directives and `node`s); rendering of errors with the source around them
///   :expansion     `$name`, `${name:-word}`, quotes: one word, several words, bodies of here-documents
///   :instructions  `file` -> `parsed` (global ARGs and stages of typed instructions), mounts, ports, signals
///   :checks        build checks, the `# check=` directive, and the texts of image history
///
/// A frontend calls `parse`, `parse_instructions`, throws `to_error` when there are errors, runs `check_file`, and then
/// walks the stages: ARG and ENV scope, platform arguments, which stages are needed, images and graph are its work.
/// Terms: a *word* is one argument before expansion; *lines* count from 1 in the file as written; a *trigger* is the
/// instruction behind ONBUILD.
///
/// Pure functions of their arguments: no files, no network, no clock, no state; safe from any thread. Costs are linear in
/// the text (the pattern forms of expansion: pattern length times value length).
/// Errors: `cobuild::error` of kind `invalid`; those with a place in the file carry it (`where()`).
export module cobuild.dockerfile;

export import :syntax;
export import :expansion;
export import :instructions;
export import :checks;
