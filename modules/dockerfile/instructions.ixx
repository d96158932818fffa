/// From the tree to typed instructions and stages. Values are as written, before expansion, unless said otherwise.
module;
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

export module cobuild.dockerfile:instructions;

import cobuild.base;
import :syntax;

export namespace cobuild::dockerfile {

struct key_value {
    std::string key;
    std::string value;
    bool legacy = false;  ///< from the form "ENV key value"
    bool operator==(const key_value&) const = default;
};

struct arg_declaration {
    std::string key;
    std::optional<std::string> value;  ///< the default
    std::string description;           ///< from a comment "# key text" directly above
    bool operator==(const arg_declaration&) const = default;
};

/// What RUN, CMD and ENTRYPOINT run: `args` as they are, or in shell form one string for the shell. Never expanded here.
struct command_line {
    std::vector<std::string> args;
    bool shell_form = false;
    bool operator==(const command_line&) const = default;
};

// ---------------------------------------------------------------- RUN --mount

enum class mount_type { bind, cache, tmpfs, secret, ssh };
enum class cache_sharing { shared, private_, locked };
std::string_view to_string(mount_type type) noexcept;
std::string_view to_string(cache_sharing sharing) noexcept;

/// One RUN --mount, after expansion. Unset stays unset: defaults (ids, targets, modes) are the frontend's.
struct mount {
    mount_type type = mount_type::bind;
    std::string from;  ///< never expanded
    std::string source;
    std::string target;    ///< as given: may be relative or empty
    bool readonly = true;  ///< by default true for bind, secret and ssh
    std::string id;
    std::optional<cache_sharing> sharing;
    bool required = false;
    std::uint64_t size_limit = 0;  ///< bytes, 0 for none
    std::optional<std::uint32_t> mode, uid, gid;
    std::optional<std::string> env;  ///< given, perhaps empty
    bool operator==(const mount&) const = default;
};

/// A mount before expansion: the CSV text, and what must be known to order the stages.
struct mount_text {
    std::string csv;
    std::string from;
    bool operator==(const mount_text&) const = default;
};

using expander = std::function<std::string(std::string_view word)>;
/// Parses "type=cache,target=/x" and checks the keys against the type; `expand` is called for every value but `from`'s.
mount parse_mount(std::string_view csv, const expander& expand);

/// RUN --device: "name[,required]" or "name=...,required=bool".
struct device {
    std::string name;
    bool required = false;
    bool operator==(const device&) const = default;
};

// ---------------------------------------------------------------- the instructions

struct from_instruction {
    std::string base;
    std::string platform;
    std::string name;          ///< lower case, empty when there is no AS
    std::string name_written;  ///< as written
    std::string as;            ///< the word AS as written
};

enum class network_mode { default_, none, host };
enum class security_mode { sandbox, insecure };

struct run_instruction {
    command_line command;
    std::vector<mount_text> mounts;
    network_mode network = network_mode::default_;
    security_mode security = security_mode::sandbox;
    std::vector<device> devices;
    std::vector<heredoc> heredocs;

    /// The script when the one word of the command is a here-document: its body, run by the shell or, when it begins with
    /// `#!`, as a file of the here-document's name.
    [[nodiscard]] const heredoc* script() const;
    /// What the shell is given (shell form): the script's body, or the command followed by all here-documents as written.
    [[nodiscard]] std::string shell_text() const;
};

/// COPY and ADD alike.
struct transfer {
    std::vector<std::string> sources;  ///< paths and URLs in order, without the here-documents
    std::vector<heredoc> heredocs;     ///< files made of here-documents; bodies not expanded, see heredoc::expand and text()
    std::string destination;
    std::string chown, chmod;
    bool link = false;
    std::vector<std::string> exclude;
};
struct copy_instruction : transfer {
    std::string from;  ///< never expanded
    bool parents = false;
};
struct add_instruction : transfer {
    std::string checksum;
    std::optional<bool> keep_git_dir, unpack;
};

struct env_instruction {
    std::vector<key_value> pairs;
};
struct label_instruction {
    std::vector<key_value> pairs;
};
struct arg_instruction {
    std::vector<arg_declaration> args;
};
struct workdir_instruction {
    std::string path;
};
struct user_instruction {
    std::string user;
};
struct expose_instruction {
    std::vector<std::string> ports;
};  ///< sorted words; expand_words, then parse_port
struct volume_instruction {
    std::vector<std::string> paths;
};
struct cmd_instruction {
    command_line command;
};
struct entrypoint_instruction {
    command_line command;
};
struct shell_instruction {
    std::vector<std::string> shell;
};
struct stopsignal_instruction {
    std::string signal;
};  ///< checked unless it holds a variable; else is_signal later
struct maintainer_instruction {
    std::string name;
};

/// Durations 0 mean "not set". `test` is {"NONE"}, {"CMD", args...} or {"CMD-SHELL", text}.
struct healthcheck_instruction {
    std::vector<std::string> test;
    nanoseconds interval{}, timeout{}, start_period{}, start_interval{};
    int retries = 0;
};

struct instruction;
struct onbuild_instruction {
    std::string source;  ///< the trigger's text as an image config stores it, here-documents included
    std::shared_ptr<const instruction> trigger;
};

using instruction_body =
    std::variant<from_instruction, run_instruction, copy_instruction, add_instruction, env_instruction, label_instruction, arg_instruction,
                 workdir_instruction, user_instruction, expose_instruction, volume_instruction, cmd_instruction, entrypoint_instruction,
                 shell_instruction, stopsignal_instruction, maintainer_instruction, healthcheck_instruction, onbuild_instruction>;

struct instruction {
    instruction_body body;
    std::string keyword;  ///< as written
    std::string source;   ///< the logical line as written: what progress shows before expansion
    line_range lines;
    std::vector<std::string> comments;  ///< directly above
};

struct stage {
    unsigned index = 0;
    std::string name;  ///< lower case, or empty
    std::string base;
    std::string platform;
    std::string description;  ///< from a comment "# name text" directly above
    instruction from;         ///< the FROM itself
    std::vector<instruction> instructions;
};

struct parsed {
    std::vector<instruction> global_args;  ///< ARG before the first FROM; every body is an arg_instruction
    std::vector<stage> stages;

    /// By name, ignoring case, or nothing; the last one when a name is used twice.
    [[nodiscard]] const stage* find(std::string_view name) const;
};

struct parse_result {
    parsed value;
    std::vector<diagnostic> errors;  ///< in the order of lines; `value` is complete only when this is empty
};

/// Types every instruction and reports everything that is wrong with the file without expanding anything.
parse_result parse_instructions(const file& f);

/// Types one node (parse_line of an ONBUILD trigger). Throws errc::invalid without a place.
instruction parse_instruction(const node& n, char escape = '\\');

/// Applies `expand` to every field that the language expands into one word: ENV, LABEL, COPY and ADD (not --from, not
/// here-documents, not --exclude), WORKDIR, USER, VOLUME, STOPSIGNAL. ARG defaults, EXPOSE, FROM and mounts are the caller's.
void expand_fields(instruction_body& body, const expander& expand);

/// One word of EXPOSE after expansion: `[[ip:]host:]container[/proto]`, each side a port or a range.
struct exposed_ports {
    std::vector<std::string> ports;  ///< "80/tcp", protocol in lower case
    bool odd_protocol_case = false;  ///< check ExposeProtoCasing
    bool host_part = false;          ///< check ExposeInvalidFormat
};
exposed_ports parse_port(std::string_view word);

/// Whether STOPSIGNAL accepts it: a number, or a Linux signal's name in any case with or without "SIG".
bool is_signal(std::string_view text);

/// The error of a FROM whose base expands to nothing: names the arguments, and where one is declared too late to be seen.
std::string blank_base_message(const parsed& p, const stage& s, char escape = '\\');

/// The names of all instructions, upper case, sorted.
const std::vector<std::string_view>& instruction_names();

}  // namespace cobuild::dockerfile
